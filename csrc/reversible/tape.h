// The engine of reversible blocks.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "reversible/replay.h"

namespace pyfast {

// The two streams of one run through a sequence of blocks, forward and back. F reads stream 1 and
// adds to 0, G the reverse. The graph that autograd sees holds no data, just tokens: so the streams
// can be changed in place. Any number of backwards may be under way at once, each on streams of its
// own.
class Tape {
 public:
  // bits: of the fraction, or -1; `fixed`: of int32 streams. flags: an int32 for x1, x2, F0, G0,
  // F1, .., and a spare.
  Tape(const Tensor& x1, const Tensor& x2, int64_t bits, bool fixed, Tensor flags);

  // stream[1 - reads] += half(stream[reads]), of a span of them
  std::shared_ptr<Call> forward(int64_t reads, const py::object& half, int64_t slot,
                                bool x_requires_grad, bool accumulates, int64_t dim, int64_t first,
                                int64_t length);

  // The call is undone: the streams become those before. Their gradients, and those of what it
  // read.
  std::vector<std::optional<Tensor>> backward(int64_t at, int64_t reads, const py::object& half,
                                              const Call&, const std::optional<Tensor>& d1,
                                              const std::optional<Tensor>& d2);

  Tensor read(const Tensor& stream) const;  // in the inputs' dtype; itself, if it is that
  std::pair<Tensor, Tensor> streams(
      bool last);  // what a caller may keep: copies, but after the last block
  void resume(int64_t at, const Tensor& y1,
              const Tensor& y2);  // what the backward of call `at` is to start from
  void finish(int64_t task);      // drops what the backward of a graph task left

 private:
  struct Streams {
    std::array<Tensor, 2> value;
    std::array<bool, 2> owned{};
    void own(int64_t i);
  };
  struct Backward {
    Streams streams;
    std::array<Tensor, 2> slope,
        returned;  // returned: gradients that are ours to change if they come back
    std::array<bool, 2> slope_owned{};
    std::map<int64_t, std::array<Tensor, 2>> resumed;
  };

  Tensor entered(const Tensor& x, int64_t slot);
  std::vector<Tensor> undo(Backward&, int64_t reads, const py::object& half, const Call&);
  void add_slope(Backward&, int64_t stream, const Span&, Tensor slope);
  Tensor flag(int64_t slot) const { return flags_.narrow(0, slot, 1); }

  c10::ScalarType dtype_, slope_dtype_;
  int64_t bits_;
  bool fixed_;
  Tensor flags_;
  Streams forward_;
  std::map<int64_t, Backward> backward_;  // by graph task
};

void bind_reversible(py::module_&);

}  // namespace pyfast
