"""Rows of results."""

from dataclasses import dataclass


@dataclass
class Row:
    """One implementation of one case: a line of the table, the CSV and the JSON."""

    op: str
    shape: str
    m: int | None
    dtype: str
    impl: str
    variant: str = ""  # what else the case is: a rank, a rate of dropout
    model: str = ""  # a model that has such a layer
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    calls: int = 0
    rounds: int = 0  # number of rounds that the calls are from
    graph: bool = False  # it ran in a CUDA graph: launches are not in the times
    launch_ms: float | None = None  # host time of launching
    moved_bytes: int | None = None
    flops: float = 0.0
    gb_s: float | None = None
    tflop_s: float | None = None
    bound: str | None = None  # "copy" or "gemm": the ceiling that is nearer
    percent: float | None = None  # of that ceiling
    held_mb: float | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None  # for the backward, beside parameters and weights
    max_error: float | None = None
    error_limit: float | None = None
    same_bits: bool | None = None  # the result equals pyfast's bit for bit
    times_pyfast: float | None = None  # its time over pyfast's, by pairs in the same rounds
    ratio_p20: float | None = None  # the spread of times_pyfast
    ratio_p80: float | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Return whether a call that was to run gave no time: wrong, raised, or out of memory."""
        return self.ms_p50 is None and bool(self.note)

    @property
    def added_mb(self) -> float | None:
        """Memory that a call adds to what is held."""
        return None if self.peak_mb is None else self.peak_mb - self.held_mb
