// mypt_fast._native: the only file that knows Python. It converts arguments, releases the GIL and
// turns C++ errors into mypt_fast.errors; all work is done in the other files.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_source.h"
#include "corpus.h"
#include "errors.h"
#include "file_ends.h"
#include "gather.h"
#include "mixture.h"
#include "order.h"
#include "permutation.h"
#include "ring.h"
#include "shard_file.h"

namespace py = pybind11;
using namespace mypt::data;

namespace {

using IdentityTuple = std::tuple<std::uint64_t, std::uint64_t, std::int64_t>;
using SpecTuple = std::tuple<std::string, int, std::uint64_t, std::uint64_t, std::uint64_t,
                             IdentityTuple>;
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

std::shared_ptr<Corpus> open_corpus(const std::vector<SpecTuple>& shards, const std::string& io) {
  py::gil_scoped_release unlocked;
  auto corpus = std::make_shared<Corpus>(io_from_name(io));
  for (const auto& [path, width, n_tokens, offset, file_size, identity] : shards) {
    const auto& [device, inode, changed_ns] = identity;
    corpus->add_file({path, width, n_tokens, offset, file_size, {device, inode, changed_ns}});
  }
  return corpus;
}

py::list ends_of_files(const std::vector<std::string>& paths, std::size_t head, std::size_t tail) {
  std::vector<FileEnds> all;
  {
    py::gil_scoped_release unlocked;
    all = read_ends(paths, head, tail);
  }
  py::list out;
  for (const FileEnds& ends : all) {
    if (!ends.is_read) {
      out.append(py::none());
      continue;
    }
    const Identity& id = ends.identity;
    out.append(py::make_tuple(ends.size, py::make_tuple(id.device, id.inode, id.changed_ns),
                              py::bytes(ends.head), py::bytes(ends.tail)));
  }
  return out;
}

std::shared_ptr<Corpus> wrap_tokens(const py::array& tokens) {
  const bool is_u16 = py::isinstance<py::array_t<std::uint16_t, py::array::c_style>>(tokens);
  const bool is_u32 = py::isinstance<py::array_t<std::uint32_t, py::array::c_style>>(tokens);
  if (tokens.ndim() != 1 || !(is_u16 || is_u32)) {
    throw std::invalid_argument("tokens must be a contiguous 1-D uint16 or uint32 array");
  }
  auto corpus = std::make_shared<Corpus>();
  corpus->add_memory(static_cast<const std::byte*>(tokens.data()), is_u16 ? 2 : 4,
                     static_cast<std::uint64_t>(tokens.size()));
  return corpus;
}

std::int64_t* writeable(const py::array& array, const char* name, py::ssize_t seq_len) {
  if (!py::isinstance<Int64Array>(array) || !array.writeable()) {
    throw std::invalid_argument(std::string(name) +
                                " must be a writeable C-contiguous int64 array");
  }
  if (array.ndim() != 2 || array.shape(1) != seq_len) {
    throw std::invalid_argument(std::string(name) + " must be (rows, " + std::to_string(seq_len) +
                                ")");
  }
  return static_cast<std::int64_t*>(const_cast<void*>(array.data()));
}

Batch batch_of(const py::array& x, const py::array& y, std::uint64_t seq_len) {
  const auto T = static_cast<py::ssize_t>(seq_len);
  const Batch batch{writeable(x, "x", T),
                    writeable(y, "y", T),
                    nullptr,
                    0,
                    static_cast<std::size_t>(x.shape(0)),
                    static_cast<std::size_t>(T)};
  if (y.shape(0) != x.shape(0)) throw std::invalid_argument("x and y differ in their rows");
  const std::size_t size = batch.rows * batch.seq_len;
  if (batch.x < batch.y + size && batch.y < batch.x + size) {
    throw std::invalid_argument("x and y overlap");
  }
  return batch;
}

Batch windows_of(const py::array& windows, std::uint64_t seq_len, int width) {
  const bool is_u16 = py::isinstance<py::array_t<std::uint16_t, py::array::c_style>>(windows);
  const bool is_u32 = py::isinstance<py::array_t<std::uint32_t, py::array::c_style>>(windows);
  if (!windows.writeable() || !((is_u16 && width == 2) || is_u32)) {
    throw std::invalid_argument("windows must be a writeable C-contiguous uint" +
                                std::to_string(8 * width) + " array");
  }
  if (windows.ndim() != 2 || windows.shape(1) != static_cast<py::ssize_t>(seq_len) + 1) {
    throw std::invalid_argument("windows must be (rows, " + std::to_string(seq_len) + " + 1)");
  }
  return {nullptr,
          nullptr,
          static_cast<std::byte*>(const_cast<void*>(windows.data())),
          is_u16 ? 2 : 4,
          static_cast<std::size_t>(windows.shape(0)),
          static_cast<std::size_t>(seq_len)};
}

std::shared_ptr<BatchSource> make_source(std::shared_ptr<const Corpus> corpus,
                                         std::shared_ptr<const SampleStream> order,
                                         const std::string& kernel) {
  return std::make_shared<BatchSource>(std::move(corpus), std::move(order),
                                       kernel_from_name(kernel));
}

std::uint32_t read_batch(const BatchSource& source, std::uint64_t first, const Batch& batch,
                         std::uint64_t next) {
  py::gil_scoped_release unlocked;
  BatchSource::Work work;
  return source.read(first, batch, next, false, work);
}

std::uint32_t read_pair(const BatchSource& source, std::uint64_t first, const py::array& x,
                        const py::array& y, std::uint64_t next) {
  return read_batch(source, first, batch_of(x, y, source.seq_len()), next);
}

std::uint32_t read_windows(const BatchSource& source, std::uint64_t first,
                           const py::array& windows, std::uint64_t next) {
  return read_batch(source, first, windows_of(windows, source.seq_len(), source.width()), next);
}

// The ring, and the arrays that its slots are.
class PyRing {
 public:
  PyRing(const std::shared_ptr<const BatchSource>& source, const Plan& plan,
         const std::vector<py::tuple>& slots, std::size_t low_water)
      : slots_(slots) {
    std::vector<Batch> batches;
    for (const py::tuple& slot : slots) {
      batches.push_back(slot.size() == 2
                            ? batch_of(slot[0], slot[1], source->seq_len())
                            : windows_of(slot[0], source->seq_len(), source->width()));
    }
    ring_ = std::make_unique<Ring>(source, plan, std::move(batches), low_water);
  }
  ~PyRing() {
    if (ring_->is_forked()) {
      // The thread is not in this process, and waits on what would be destroyed: leave all of it.
      static_cast<void>(ring_.release());
      return;
    }
    py::gil_scoped_release unlocked;  // the worker is waited for
    ring_.reset();
  }

  // Give back the oldest `back` lent slots and take a batch: (slot, largest token id). The
  // interpreter can be interrupted while the worker is behind.
  std::pair<std::size_t, std::uint32_t> take(std::size_t back) {
    using std::chrono::milliseconds;
    if (ring_->is_forked()) {
      throw DataError("a batch in a forked process",
                      "the worker that reads ahead is in the process that was forked",
                      "make the loader after the fork, or without prefetch");
    }
    if (back) ring_->release(back);
    Ring::Taken taken{};
    if (ring_->take(milliseconds(0), taken)) return {taken.slot, taken.largest};
    while (true) {
      {
        py::gil_scoped_release unlocked;
        ring_->fill_here();
        if (ring_->take(milliseconds(100), taken)) return {taken.slot, taken.largest};
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }
  std::uint64_t batches() const { return ring_->batches_taken(); }
  std::uint64_t waits() const { return ring_->times_waited(); }

 private:
  std::vector<py::tuple> slots_;
  std::unique_ptr<Ring> ring_;
};

std::unique_ptr<PyRing> make_ring(std::shared_ptr<const BatchSource> source, std::uint64_t first,
                                  std::uint64_t global_batch, std::uint64_t share,
                                  std::uint64_t rows, const std::vector<py::tuple>& slots,
                                  std::size_t low_water) {
  return std::make_unique<PyRing>(source, Plan{first, global_batch, share, rows}, slots,
                                  low_water);
}

std::uint32_t gather_starts(const Corpus& corpus, const std::vector<std::uint64_t>& starts,
                            const py::array& x, const py::array& y, const std::string& kernel) {
  if (x.ndim() != 2) throw std::invalid_argument("x must be 2-D");
  const Batch batch = batch_of(x, y, static_cast<std::uint64_t>(x.shape(1)));
  if (starts.size() != batch.rows) throw std::invalid_argument("one start per row is needed");
  const Kernel chosen = kernel_from_name(kernel);
  py::gil_scoped_release unlocked;
  Scratch scratch;
  return gather(corpus, starts.data(), 0, false, batch, chosen, scratch);
}

// The tokens [start, start + count) as uint16 or uint32, as wide as the corpus is.
py::array corpus_span(const Corpus& corpus, std::uint64_t start, std::uint64_t count) {
  const auto size = static_cast<py::ssize_t>(count);
  if (!corpus.contains(start, count)) throw std::out_of_range("the tokens leave the corpus");
  const bool is_wide = corpus.width() == 4;
  py::array out = is_wide ? py::array(py::array_t<std::uint32_t>(size))
                          : py::array(py::array_t<std::uint16_t>(size));
  if (count == 0) return out;
  const Batch row{nullptr, nullptr, static_cast<std::byte*>(out.mutable_data()),
                  corpus.width(), 1, static_cast<std::size_t>(count) - 1};
  py::gil_scoped_release unlocked;
  Scratch scratch;
  gather(corpus, &start, 0, true, row, best_kernel(), scratch);
  return out;
}

py::array_t<std::int64_t> to_array(const std::vector<std::uint64_t>& values) {
  py::array_t<std::int64_t> out(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

py::array_t<std::int64_t> order_starts(const SampleStream& order, std::uint64_t first,
                                       std::size_t count) {
  check_samples(first, count);  // before that much memory is asked for
  std::vector<std::uint64_t> starts(count);
  order.starts(first, count, starts.data());
  return to_array(starts);
}

std::uint64_t inside(const Permutation& permutation, std::uint64_t index) {
  if (index >= permutation.n()) {
    throw std::invalid_argument("permutation index outside [0, " +
                                std::to_string(permutation.n()) + ")");
  }
  return index;
}

std::shared_ptr<MixtureOrder> mixture_order(
    const std::vector<std::uint64_t>& sizes, std::uint64_t seq_len, std::uint64_t seed,
    const std::string& kind, std::uint64_t block_tokens, std::uint64_t pool_blocks,
    const std::vector<std::pair<std::uint64_t, std::vector<std::uint32_t>>>& phases) {
  std::vector<Phase> copied;
  for (const auto& [until, quotas] : phases) copied.push_back({until, quotas});
  return std::make_shared<MixtureOrder>(sizes, seq_len, seed, order_from_name(kind),
                                        Blocks{block_tokens, pool_blocks}, copied);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel kernel : available_kernels()) names.emplace_back(kernel_name(kernel));
  return names;
}

void raise_as(const char* type, const Error& error) {
  const py::object cls = py::module_::import("mypt_fast.errors").attr(type);
  const py::object value = cls(error.what_part, error.found_part, error.cure_part);
  PyErr_SetObject(cls.ptr(), value.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const DataError& error) {
    raise_as("DataError", error);
  } catch (const DataChangedError& error) {
    raise_as("DataChangedError", error);
  } catch (const IntegrityError& error) {
    raise_as("IntegrityError", error);
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::overflow_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Token shards, data order and batch gathering in C++.";
  m.attr("ALGORITHM") = kAlgorithm;
  m.attr("ORDER_ALGORITHMS") =
      py::dict(py::arg("epoch") = kAlgorithm, py::arg("sequential") = kAlgorithm,
               py::arg("replacement") = kReplacementAlgorithm,
               py::arg("block") = kBlockAlgorithm, py::arg("mixture") = kMixtureAlgorithm);
  py::register_local_exception_translator(translate);

  m.def("is_remote", is_remote, py::arg("path"));
  m.def("resident_share", resident_share, py::arg("path"));
  m.def("read_ends", ends_of_files, py::arg("paths"), py::arg("head"), py::arg("tail"));
  m.def("best_kernel", [] { return kernel_name(best_kernel()); });
  m.def("available_kernels", kernel_names);
  m.def("gather", gather_starts, py::arg("corpus"), py::arg("starts"), py::arg("x"), py::arg("y"),
        py::arg("kernel") = "auto");

  py::class_<Corpus, std::shared_ptr<Corpus>>(m, "Corpus")
      .def_static("open", open_corpus, py::arg("shards"), py::arg("io") = "mmap")
      .def_static("wrap", wrap_tokens, py::arg("tokens"), py::keep_alive<0, 1>())
      .def("span", corpus_span, py::arg("start"), py::arg("count"))
      .def_property_readonly("n_tokens", &Corpus::n_tokens);

  py::class_<Permutation>(m, "Permutation")
      .def(py::init<std::uint64_t, std::uint64_t, std::uint64_t>(), py::arg("n"), py::arg("seed"),
           py::arg("epoch"))
      .def_property_readonly("n", &Permutation::n)
      .def("at", [](const Permutation& p, std::uint64_t i) { return p.at(inside(p, i)); },
           py::arg("index"))
      .def("inverse", [](const Permutation& p, std::uint64_t i) { return p.inverse(inside(p, i)); },
           py::arg("value"));

  py::class_<SampleStream, std::shared_ptr<SampleStream>>(m, "SampleStream")
      .def_property_readonly("n_tokens", &SampleStream::n_tokens)
      .def_property_readonly("seq_len", &SampleStream::seq_len)
      .def("starts", order_starts, py::arg("first_sample"), py::arg("count"));

  py::class_<SampleOrder, SampleStream, std::shared_ptr<SampleOrder>>(m, "SampleOrder")
      .def(py::init([](std::uint64_t n_tokens, std::uint64_t seq_len, std::uint64_t seed,
                       const std::string& kind, std::uint64_t block_tokens,
                       std::uint64_t pool_blocks) {
             return std::make_shared<SampleOrder>(n_tokens, seq_len, seed, order_from_name(kind),
                                                  Blocks{block_tokens, pool_blocks});
           }),
           py::arg("n_tokens"), py::arg("seq_len"), py::arg("seed"), py::arg("kind") = "epoch",
           py::arg("block_tokens") = Blocks{}.tokens, py::arg("pool_blocks") = Blocks{}.pool)
      .def_property_readonly("n_windows", &SampleOrder::n_windows);

  py::class_<MixtureOrder, SampleStream, std::shared_ptr<MixtureOrder>>(m, "MixtureOrder")
      .def(py::init(&mixture_order), py::arg("sizes"), py::arg("seq_len"), py::arg("seed"),
           py::arg("kind"), py::arg("block_tokens"), py::arg("pool_blocks"), py::arg("phases"))
      .def_property_readonly("n_windows", &MixtureOrder::n_windows)
      .def("sources",
           [](const MixtureOrder& order, std::uint64_t first, std::uint64_t count) {
             return to_array(order.sources(first, count));
           },
           py::arg("first_sample"), py::arg("count"));

  py::class_<BatchSource, std::shared_ptr<BatchSource>>(m, "BatchReader")
      .def(py::init(&make_source),
           // The Python corpus, not only the C++ one: it may be what keeps wrapped tokens alive.
           py::keep_alive<1, 2>(), py::arg("corpus"), py::arg("order"), py::arg("kernel") = "auto")
      .def("read", read_pair, py::arg("first_sample"), py::arg("x"), py::arg("y"),
           py::arg("next_sample"))
      .def("read_windows", read_windows, py::arg("first_sample"), py::arg("windows"),
           py::arg("next_sample"))
      .def_property_readonly("width", &BatchSource::width);

  py::class_<PyRing>(m, "Ring")
      .def(py::init(&make_ring), py::keep_alive<1, 2>(), py::arg("reader"), py::arg("first"),
           py::arg("global_batch"), py::arg("share"), py::arg("rows"), py::arg("slots"),
           py::arg("low_water"))
      .def("take", &PyRing::take, py::arg("back") = 0)
      .def_property_readonly("batches", &PyRing::batches)
      .def_property_readonly("waits", &PyRing::waits);
}
