/* Counts what a process asks of the file system, and fails or dies at the n-th request.

   shim_arm(n, mode, error): mode 0 only counts; 1 dies before the n-th request; 2 dies after half
   of it, where it is a write; 3 dies after it; 4 fails it with `error`; 5 fails it and all later
   ones. shim_count() says how many requests there were since. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static int armed, at, mode, error, count;

void shim_arm(int n, int how, int code) { at = n; mode = how; error = code; count = 0; armed = 1; }
void shim_disarm(void) { armed = 0; }
int shim_count(void) { return count; }

/* 0: go on; 1: fail; 2: this is the request to die at after doing some of it */
static int turn(void) {
  if (!armed) return 0;
  ++count;
  if (mode == 5 && count >= at) { errno = error; return 1; }
  if (count != at) return 0;
  if (mode == 1) _exit(9);
  if (mode == 4) { errno = error; return 1; }
  return mode == 2 || mode == 3 ? 2 : 0;
}

#define REAL(NAME, TYPE, ...)                                     \
  static TYPE (*real)(__VA_ARGS__);                               \
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, #NAME);           \
  int what = turn();                                              \
  if (what == 1) return -1;

#define SIMPLE(NAME, PARAMS, CALL)                                \
  int NAME PARAMS {                                               \
    REAL(NAME, int, )                                             \
    int got = ((int(*) PARAMS)real) CALL;                         \
    if (what == 2) _exit(9);                                      \
    return got;                                                   \
  }

ssize_t write(int fd, const void *data, size_t size) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "write");
  int what = fd > 2 ? turn() : 0;
  if (what == 1) return -1;
  ssize_t got = real(fd, data, what == 2 && mode == 2 ? size / 2 : size);
  if (what == 2) _exit(9);
  return got;
}

static int opened(const char *name, const char *path, int flags, mode_t bits) {
  int (*real)(const char *, int, ...);
  *(void **)&real = dlsym(RTLD_NEXT, name);
  int what = flags & (O_CREAT | O_WRONLY | O_RDWR) ? turn() : 0;
  if (what == 1) return -1;
  int got = real(path, flags, bits);
  if (what == 2) _exit(9);
  return got;
}
int open(const char *path, int flags, ...) {
  va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, int); va_end(rest);
  return opened("open", path, flags, bits);
}
int open64(const char *path, int flags, ...) {
  va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, int); va_end(rest);
  return opened("open64", path, flags, bits);
}

SIMPLE(fsync, (int fd), (fd))
SIMPLE(mkdir, (const char *path, mode_t bits), (path, bits))
SIMPLE(rename, (const char *a, const char *b), (a, b))
SIMPLE(link, (const char *a, const char *b), (a, b))
SIMPLE(linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f))
SIMPLE(unlink, (const char *path), (path))
SIMPLE(unlinkat, (int d, const char *path, int f), (d, path, f))
SIMPLE(rmdir, (const char *path), (path))
SIMPLE(renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f))
