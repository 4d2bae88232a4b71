"""Comparison of two results: a slower op is told from noise, and from a slower machine."""

import copy
import json
import random

import pytest

from bench.report import compare, record
from bench.report.record import Damaged

PEERS = ("torch", "torch-fp32", "bnb-train")
SIZES = (1, 16, 64, 512)


def row(op: str, m: int, impl: str, ms: float, spread: float = 0.02) -> dict:
    times = {"ms_p20": ms * (1 - spread), "ms_p50": ms, "ms_p80": ms * (1 + spread)}
    return {
        "op": op,
        "shape": "64x64",
        "m": m,
        "dtype": "bf16",
        "impl": impl,
        "variant": "",
        "note": "",
        **times,
    }


def result(pyfast=1.0, machine=1.0, noise=0.0, seed=0, spread=0.02, peers=PEERS) -> dict:
    """Return a run in which pyfast takes `pyfast` times its time, and everything `machine` times."""
    noisy = random.Random(seed)
    rows = []
    for op in ("linear", "linear dX"):
        for m in SIZES:
            for number, impl in enumerate(("pyfast", *peers)):
                ms = (1 + 0.1 * m) * (1 + number) * machine * (pyfast if impl == "pyfast" else 1)
                rows.append(row(op, m, impl, ms * (1 + noise * noisy.uniform(-1, 1)), spread))
    about = {
        "cpu": "a CPU",
        "cores": "2 cores",
        "isa": "AVX2",
        "torch": "2.13.0",
        "bitsandbytes": "0.50.2",
    }
    return {"bench": "nf4", "machine": about, "ceilings": {"copy": 1e10}, "rows": rows, "goals": []}


def verdicts(old: dict, new: dict) -> set[str]:
    return {change.verdict for change in compare.between(old, new)}


def test_a_slower_op_is_flagged_and_only_that():
    old, new = result(), result()
    for line in new["rows"]:
        if line["op"] == "linear dX" and line["impl"] == "pyfast":
            line |= {key: 1.2 * line[key] for key in ("ms_p20", "ms_p50", "ms_p80")}
    comparison = compare.between(old, new)
    assert {change.row.op for change in comparison if change.verdict == "slower"} == {"linear dX"}
    assert comparison.count("slower") == len(SIZES) and comparison.count("same") == len(SIZES)
    assert {change.verdict for change in compare.between(new, old)} == {"faster", "same"}
    assert all(
        change.ratio == pytest.approx(1.2) for change in comparison if change.verdict == "slower"
    )


def test_noise_is_no_change():
    for seed in range(20):
        old, new = (
            result(noise=0.06, seed=seed, spread=0.08),
            result(noise=0.06, seed=seed + 100, spread=0.08),
        )
        assert verdicts(old, new) == {"same"}


def test_small_changes_are_none_even_without_noise():
    assert verdicts(result(spread=0), result(pyfast=1.04, spread=0)) == {"same"}
    assert verdicts(result(spread=0), result(pyfast=1.06, spread=0)) == {"slower"}


@pytest.mark.parametrize("machine", [0.5, 1.3, 3.0])
def test_the_machines_drift_is_no_change_and_hides_none(machine):
    comparison = compare.between(result(), result(machine=machine))
    assert {change.verdict for change in comparison} == {"same"}
    assert comparison.drift.middle == pytest.approx(machine) and comparison.drift.rows == 2 * len(
        SIZES
    ) * len(PEERS)
    assert verdicts(result(), result(pyfast=1.2, machine=machine)) == {"slower"}
    assert verdicts(result(), result(pyfast=0.8, machine=machine)) == {"faster"}


def test_drift_that_is_not_well_known_flags_less():
    """Peers that moved by anything between 0.8 and 1.25 cannot tell 1.2 from the machine."""
    new = result(pyfast=1.2)
    factors = (0.8, 1.0, 1.25)
    peers = [line for line in new["rows"] if line["impl"] != "pyfast"]
    for line, factor in zip(peers, factors * len(peers)):
        line |= {key: factor * line[key] for key in ("ms_p20", "ms_p50", "ms_p80")}
    assert verdicts(result(), new) == {"same"}


def test_a_slow_spell_during_one_case_is_no_change():
    """The peers of the case were timed in turns with it, and became slower too."""
    new = result()
    for line in new["rows"]:
        if line["m"] == 64 and line["op"] == "linear":
            line |= {key: 1.5 * line[key] for key in ("ms_p20", "ms_p50", "ms_p80")}
    assert verdicts(result(), new) == {"same"}


def test_one_call_has_no_spread_and_tells_no_change():
    old, new = result(), result(pyfast=2)
    old["rows"][0]["calls"], new["rows"][0]["calls"], new["rows"][4]["calls"] = 1, 50, 50
    first, *others = compare.between(old, new)
    assert (first.verdict, first.why) == ("same", "fewer than 3 calls")
    assert {change.verdict for change in others} == {"slower"}


def test_peers_with_another_version_tell_no_drift():
    old, new = result(), result()
    new["machine"]["bitsandbytes"] = "0.51.0"
    for line in new["rows"]:
        if line["impl"] == "bnb-train":
            line |= {key: 9 * line[key] for key in ("ms_p20", "ms_p50", "ms_p80")}
    comparison = compare.between(old, new)
    assert comparison.drift.rows == 2 * len(SIZES) * 2 and comparison.drift.high == pytest.approx(1)


def test_rows_in_one_run_only_are_told():
    old, new = result(), result(peers=(*PEERS, "torchao"))
    old["rows"] = [line for line in old["rows"] if line["m"] != 64]
    new["rows"] = [line for line in new["rows"] if (line["m"], line["op"]) != (512, "linear")]
    comparison = compare.between(old, new)
    assert [(change.row.m, change.row.op) for change in comparison if change.verdict == "gone"] == [
        (512, "linear")
    ]
    assert [change.row.m for change in comparison if change.verdict == "new"] == [64, 64]
    text = compare.table(comparison)
    assert "gone: not in the new run" in text and "new: not in the old run" in text
    assert "torchao 7" in text and "2 new, 1 gone" in compare.sentence(comparison)


def test_a_result_that_became_wrong_fails(tmp_path, capsys):
    old, new = result(), result()
    new["rows"][0] |= {
        "ms_p20": None,
        "ms_p50": None,
        "ms_p80": None,
        "note": "WRONG: max error 1.0e+00",
    }
    paths = written(tmp_path, old, new)
    assert compare.main(*paths) == 1
    assert "failed: WRONG: max error" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["cpu", "isa", "torch"])
def test_another_machine_or_torch_is_a_warning(key):
    old, new = result(), result()
    new["machine"][key] = "another one"
    comparison = compare.between(old, new)
    assert any(
        f"another {key}: {old['machine'][key]} before, another one now" in line
        for line in comparison.warnings
    )
    assert (comparison.drift.rows == 0) == (key == "torch")
    text = compare.table(comparison)
    assert "note: another" in text and text.endswith(compare.OTHER_MACHINE) == (key != "torch")


def test_without_peers_the_drift_is_not_guessed():
    comparison = compare.between(result(peers=()), result(peers=(), machine=1.3))
    assert {change.verdict for change in comparison} == {
        "slower"
    } and comparison.drift == compare.Drift()
    assert any("drift is not known" in line for line in comparison.warnings)


def test_fields_of_earlier_and_later_versions_are_ignored():
    old, new = result(), result()
    for line in old["rows"]:
        del line["variant"]
    for line in new["rows"]:
        line |= {"ratio_p20": 0.9, "of a later version": [1]}
    assert verdicts(old, new) == {"same"}


def whole_models(pyfast=1.0, peft="0.21.0") -> dict:
    """Return a run of methods to train a model."""
    size = {"shape": "1b", "layers": 4, "batch": 1, "seq": 512, "checkpointing": False, "note": ""}
    times = {"full": 4.0, "peft": 3.0, "pyfast": pyfast, "peft-bnb": 2.0, "peft-bnb+patch": pyfast}
    rows = [
        size | {"way": method, "seconds": [0.99 * s, s, 1.01 * s]} for method, s in times.items()
    ]
    rows.append(size | {"way": "unsloth", "seconds": [], "note": "needs a GPU"})
    about = {"cpu": "a CPU", "torch": "2.13.0", "peft": peft}
    return {"bench": "training_step", "machine": about, "rows": rows}


def test_whole_models_are_compared_by_their_steps():
    comparison = compare.between(whole_models(), whole_models(1.2))
    assert {change.row.impl: change.verdict for change in comparison} == {
        "pyfast": "slower",
        "peft-bnb+patch": "slower",
    }
    assert (
        comparison.drift.rows == 3
        and comparison[0].name == "training step 1b, 4 layers bf16 M=512 batch 1"
    )
    assert comparison[0].old_ms == 1000 and comparison[0].ratio == pytest.approx(1.2)
    assert compare.between(whole_models(), whole_models(peft="0.22.0")).drift.rows == 0


def test_models_of_one_length_and_depth_are_compared_without_a_spread():
    step = {"model": "Reformer", "tokens": 1024, "depth": 6, "note": ""}
    runs = [{"bench": "long_context", "setup": {"dtype": "float32", "width": 8}} for _ in range(2)]
    for run, seconds in zip(runs, (1.0, 2.0)):
        failed = step | {"model": "Transformer", "seconds": None, "note": "out of memory"}
        run["rows"] = [step | {"seconds": seconds}, failed]
    (change,) = compare.between(*runs)
    assert (change.verdict, change.why, change.ratio) == ("same", "fewer than 3 calls", 2)
    runs[1]["rows"][0] |= {"samples": [1.9, 2.0, 2.1]}
    runs[0]["rows"][0] |= {"samples": [0.9, 1.0, 1.1]}
    (change,) = compare.between(*runs)
    assert (
        change.verdict == "slower"
        and change.name == "training step 6 layers float32 M=1024 width 8"
    )


def test_committed_results_can_still_be_compared():
    subjects = {"training_step", "qlora_7b", "long_context"}
    records = [
        one for one in record.read_folder(record.ROOT / "bench/results") if one.subject in subjects
    ]
    assert {one.subject for one in records} == subjects
    for one in records:
        assert {change.verdict for change in compare.between(one, one)} == {"same"}


def written(folder, *results: dict) -> list:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, content in zip(paths, results):
        path.write_text(json.dumps(content))
    return paths


def test_exit_status_and_closing_sentence(tmp_path, capsys):
    same, slower, faster = written(tmp_path, result(), result(pyfast=1.5), result(pyfast=0.5))
    assert compare.main(same, same) == 0
    assert compare.main(same, faster) == 0
    capsys.readouterr()
    assert compare.main(same, slower) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("of 8 rows of pyfast in both, 8 slower, 0 faster") and last.endswith(
        "is taken off)."
    )


def test_inputs_are_left_as_they_were():
    old, new = result(), result(pyfast=2)
    before = copy.deepcopy((old, new))
    compare.between(old, new)
    assert (old, new) == before


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "damaged, no JSON"),
        ("[1]", "a list where an object must be"),
        ('{"bench": "nf4"}', "rows must be a list"),
        (
            '{"rows": [{"op": "a", "shape": "b", "dtype": "c", "impl": "d", "ms_p50": "fast"}]}',
            "ms_p50 must be a number",
        ),
        (
            '{"rows": [{"op": "a", "shape": "b", "dtype": "c", "impl": "d", "ms_p50": 1}]}',
            "needs its ms_p20",
        ),
        ('{"rows": [], "goals": [{"text": "{:.2f}"}]}', "a goal"),
        (
            '{"rows": [{"model": "a", "tokens": 1, "depth": 1, "seconds": 1, "note": ""}]}',
            "a training step",
        ),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, capsys, text, says):
    good, bad = written(tmp_path, result(), {})
    bad.write_text(text)
    assert compare.main(good, bad) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and str(bad) in error and says in error


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(Damaged, match="of nf4, the new one of lora"):
        compare.between(result(), result() | {"bench": "lora"})
    with pytest.raises(Damaged, match="no timed rows"):
        compare.between(result(), result() | {"rows": []})
    assert compare.main(tmp_path / "none.json", tmp_path / "none.json") == 2
