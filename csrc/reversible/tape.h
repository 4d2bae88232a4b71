// The engine of reversible blocks; README.md describes it.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "reversible/replay.h"

namespace pyfast {

// The two streams of one run through a sequence of blocks, forward and back. F reads stream 1 and
// adds to stream 0, G the reverse. The graph that autograd sees holds tokens without data, so the
// streams can be changed in place. Several backwards may run at once, each on its own streams.
class Tape {
 public:
  // bits: of the fraction, or -1. fixed: whether the streams are int32. flags: an int32 for each of
  // x1, x2, F0, G0, F1, .., and a spare one.
  Tape(const Tensor& x1, const Tensor& x2, int64_t bits, bool fixed, Tensor flags);

  // Computes stream[1 - reads] += function(stream[reads]) on a span of the streams.
  std::shared_ptr<Call> forward(int64_t reads, const py::object& function, int64_t slot,
                                bool x_requires_grad, bool accumulates, int64_t dim, int64_t first,
                                int64_t length);

  // Undoes a call: the streams become those before it. Returns the gradients of the streams, then
  // those of what the call read.
  std::vector<std::optional<Tensor>> backward(int64_t at, int64_t reads, const py::object& function,
                                              const Call&, const std::optional<Tensor>& d1,
                                              const std::optional<Tensor>& d2);

  // Returns a stream in the inputs' dtype; the stream itself if it has that dtype.
  Tensor read(const Tensor& stream) const;
  // Returns streams that a caller may keep: copies, except after the last block.
  std::pair<Tensor, Tensor> streams(bool last);
  // Sets what the backward of call `at` starts from.
  void resume(int64_t at, const Tensor& y1, const Tensor& y2);
  // Drops what the backward of a graph task left.
  void finish(int64_t task);

 private:
  struct Streams {
    std::array<Tensor, 2> value;
    std::array<bool, 2> owned{};
    void make_owned(int64_t i);
  };
  struct Backward {
    Streams streams;
    std::array<Tensor, 2> grad;
    // The gradients that were returned last, which may be changed if they come back.
    std::array<Tensor, 2> returned;
    std::array<bool, 2> grad_owned{};
    std::map<int64_t, std::array<Tensor, 2>> resumed;
  };

  Tensor enter(const Tensor& x, int64_t slot);
  std::vector<Tensor> undo(Backward&, int64_t reads, const py::object& function, const Call&);
  void add_gradient(Backward&, int64_t stream, const Span&, Tensor grad);
  Tensor flag(int64_t slot) const { return flags_.narrow(0, slot, 1); }

  c10::ScalarType dtype_, grad_dtype_;
  int64_t bits_;
  bool fixed_;
  Tensor flags_;
  Streams forward_;
  std::map<int64_t, Backward> backward_;  // by id of the graph task
};

void bind_reversible(py::module_&);

}  // namespace pyfast
