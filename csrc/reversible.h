// The engine of reversible blocks.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "replay.h"

namespace pyfast {

// The two streams of one run through a sequence of blocks, forward and back. F reads stream 1 and adds to 0, G the
// reverse. The graph that autograd sees holds no data, just tokens: so the streams can be changed in place.
class Tape {
 public:
  // bits: of the fraction, or -1; `fixed`: of int32 streams. flags: an int32 for x1, x2, F0, G0, F1, .., and a spare.
  Tape(const Tensor& x1, const Tensor& x2, int64_t bits, bool fixed, Tensor flags);

  // stream[1 - reads] += half(stream[reads]), of a span of them
  std::shared_ptr<Call> forward(int64_t reads, const py::object& half, int64_t slot, bool x_requires_grad,
                                bool accumulates, int64_t dim, int64_t first, int64_t length);

  // A block's calls, each with what it reads and what was called, are undone, from the last on: the streams become
  // those before the block. Returns their gradients, and those of what the calls read, from the last on.
  using Made = std::tuple<int64_t, py::object, std::shared_ptr<Call>>;
  std::vector<std::optional<Tensor>> backward(int64_t block, const std::vector<Made>& calls,
                                              const std::optional<Tensor>& d1, const std::optional<Tensor>& d2);

  Tensor read(const Tensor& stream) const;       // in the inputs' dtype; itself, if it is that
  std::pair<Tensor, Tensor> streams(bool last);  // what a caller may keep: copies, but after the last block
  void resume(int64_t block, const Tensor& y1, const Tensor& y2);  // what the backward of `block` is to start from
  void clear();                                                    // whatever a backward left

 private:
  Tensor entered(const Tensor& x, int64_t slot);
  std::vector<Tensor> undo(int64_t reads, const py::object& half, const Call&);
  void own(int64_t stream);
  Tensor make_room(int64_t stream, const Span&, Tensor slope);
  Tensor flag(int64_t slot) const { return flags_.narrow(0, slot, 1); }

  c10::ScalarType dtype_, slope_dtype_;
  int64_t bits_;
  bool fixed_;
  Tensor flags_;
  std::array<Tensor, 2> stream_, slope_, returned_;  // returned: gradients that are ours to change if they come back
  std::array<bool, 2> owned_{}, slope_owned_{};
  std::map<int64_t, std::array<Tensor, 2>> resumed_;
};

void bind_reversible(py::module_&);

}  // namespace pyfast
