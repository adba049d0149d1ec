"""launch/scaling/law.py, isoflop.py, data.py, fit.py: known laws are found again, with honest intervals, or refused."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from msc.launch import cli
from msc.launch.scaling.data import RunResult, ScalingData, divergence, read_scaling_data
from msc.launch.scaling.fit import as_json, fit_study
from msc.launch.scaling.isoflop import fit_isoflop, fit_learning_rate_and_batch
from msc.launch.scaling.law import PARAMETERS, Law, fit_constants, fit_law, restarts
from msc.launch.scaling.report import report_fit
from msc.pretrain.config import dump, load
from msc.pretrain.model.latent_space import LatentSpace

TRUTH = Law(0.35, 8.0, 30.0, 0.35, 0.4)
SIZES, BUDGETS = np.geomspace(1e5, 3e6, 6), np.geomspace(1e6, 3e7, 5)
GRID = tuple(values.ravel() for values in np.meshgrid(SIZES, BUDGETS))


def noisy(N, D, seed, noise=0.005, law=TRUTH):
    return law.loss(N, D) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N)))


def covered(times, draws):
    """Share of 90 % intervals that hold the truth: of every constant, the exponent, and the loss of a larger run."""
    N, D = GRID
    larger = (4 * N.max(), 4 * D.max())
    asked = {name: lambda law, name=name: getattr(law, name) for name in PARAMETERS}
    asked |= {"exponent": lambda law: law.exponent, "larger": lambda law: law.loss(*larger)}
    inside = dict.fromkeys((*asked, "one more run"), 0)
    for seed in range(times):
        found = fit_law(N, D, noisy(N, D, seed), draws=draws, seed=seed)
        for name, of in asked.items():
            low, high = found.interval(of(found.draws))
            inside[name] += bool(low <= of(TRUTH) <= high)
        _, low, high = found.predict(*larger)
        inside["one more run"] += bool(low <= noisy(*(np.array([v]) for v in larger), seed + 10**6)[0] <= high)
    return {name: count / times for name, count in inside.items()}


def test_intervals_hold_the_truth():
    """A quick look: of 90 % intervals, fewer than 22 in 30 hold the truth by chance in less than 1 %."""
    assert all(share >= 0.73 for share in covered(30, 60).values())


@pytest.mark.slow
def test_ninety_percent_intervals_cover_between_85_and_95_percent():
    shares = covered(200, 200)
    assert all(0.85 <= share <= 0.95 for share in shares.values()), shares


def test_without_noise_the_law_is_exact():
    found = fit_law(*GRID, TRUTH.loss(*GRID), draws=20, delta=1e-3)
    for name in PARAMETERS:
        assert getattr(found.law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-5)


def test_no_start_finds_a_better_fit():
    N, D = GRID
    x, y, z = np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean(), np.log(noisy(N, D, 3, 0.02))
    best = fit_constants(x, y, z, 0.01, restarts(z))
    source = np.random.default_rng(0)
    others = [best.x + source.normal(0, 0.5, 5) for _ in range(20)]
    assert fit_constants(x, y, z, 0.01, others).cost >= best.cost * (1 - 1e-6)


def test_outliers_do_not_move_the_law():
    N, D = GRID
    L = noisy(N, D, 0)
    L[[3, 17]] *= 1.5
    found = fit_law(N, D, L, draws=20)
    assert found.law.alpha == pytest.approx(TRUTH.alpha, abs=0.1)
    assert found.law.loss(4e6, 4e7) == pytest.approx(TRUTH.loss(4e6, 4e7), rel=0.03)


def test_the_optimum_is_one():
    N, D = TRUTH.optimal(1e15, 6.0)
    assert pytest.approx(1e15) == 6 * N * D
    beside = [TRUTH.loss(N * factor, D / factor) for factor in (0.9, 1.0, 1.1)]
    assert beside[1] == min(beside)


@pytest.mark.parametrize(
    ("N", "D", "said"),
    [
        (SIZES[:5], BUDGETS, "5 runs cannot carry"),
        (np.repeat(SIZES[:2], 5), np.tile(BUDGETS, 2), "2 different sizes"),
        (np.repeat(SIZES, 2), np.tile(BUDGETS[:2], 6), "2 different budgets"),
        (np.geomspace(1e5, 1.5e5, 9), np.tile(BUDGETS[:3], 3), "a factor of 2"),
        (np.geomspace(1e5, 1e6, 9), 20 * np.geomspace(1e5, 1e6, 9), "vary together"),
    ],
)
def test_degenerate_points_are_refused_with_the_reason(N, D, said):
    with pytest.raises(ValueError, match=said):
        fit_law(N, D, TRUTH.loss(N, D))


def test_a_law_that_shows_nothing_and_far_runs_are_refused():
    N, D = GRID
    losses = 1 + 30 / D**0.4 + 0.01 * (np.arange(len(D)) % 3)
    flat = ScalingData(tuple(RunResult("", n, d, 6 * n * d, loss) for n, d, loss in zip(N, D, losses, strict=True)))
    found = fit_study(flat, draws=100)
    assert any("do not show that size matters" in reason for reason in found.refused)
    assert "optimal" not in as_json(found, [1e15])
    good = fit_law(N, D, noisy(N, D, 0), draws=20)
    with pytest.raises(ValueError, match="predictions stop at 100 times"):
        good.predict(1e9, 1e9)


# Minima ----------------------------------------------------------------------------------------------------


def test_parabolas_of_equal_compute_find_the_optimum():
    points = []
    for C in (1e13, 1e14, 1e15):
        N, D = TRUTH.optimal(C, 6.0)
        points += [RunResult("", N * f, D / f, C, float(TRUTH.loss(N * f, D / f))) for f in (0.5, 0.7, 1.0, 1.4, 2.0)]
    found = fit_isoflop(ScalingData(tuple(points)))
    assert [m.place["N"] for m in found.minima] == pytest.approx(
        [TRUTH.optimal(C, 6.0)[0] for C in (1e13, 1e14, 1e15)], rel=0.05
    )
    assert found.powers["N"].exponents["C"] == pytest.approx(TRUTH.exponent, abs=0.01)
    edge = fit_isoflop(ScalingData(tuple(p for i, p in enumerate(points[:5]) if i < 3)))
    assert not edge.minima and "try larger ones" in edge.refused[0]


def test_runs_that_learned_nothing_do_not_bend_the_parabola():
    """At 1 when untrained: with those points in it the parabola's minimum would lie beyond the sizes tried."""
    losses = {1e5 / 3: 0.60, 1e5: 0.55, 3e5: 0.60, 1e6: 0.98, 3e6: 1.0, 1e7: 1.0}
    found = fit_isoflop(ScalingData(tuple(RunResult("", n, 1e13 / n, 1e13, loss) for n, loss in losses.items())))
    assert found.minima[0].place["N"] == pytest.approx(1e5, rel=0.05) and found.minima[0].points == 3


def test_a_size_that_was_repeated_leaves_room_for_others():
    losses = {3e4: (0.8,), 1e5: (0.5, 0.501, 0.502, 0.503), 3e5: (0.8,)}
    points = (RunResult("", n, 1e13 / n, 1e13, loss) for n, seeds in losses.items() for loss in seeds)
    found = fit_isoflop(ScalingData(tuple(points)))
    assert found.minima[0].place["N"] == pytest.approx(1e5, rel=0.1), found.refused


def test_an_exponent_that_is_not_pinned_down_is_refused():
    """Sizes that matter only where they are smallest: any steep power says so as well as another."""
    rng, sizes, budgets = np.random.default_rng(0), (3e4, 1e5, 3e5, 1e6), (1e5, 3e5, 1e6)
    points = [
        RunResult("", n, d, 6 * n * d, (0.2 + 0.3 * (n < 5e4) + 30 / d**0.4) * math.exp(rng.normal(0, 0.03)))
        for n in sizes for d in budgets
    ]  # fmt: skip
    found = fit_study(ScalingData(tuple(points)), draws=100)
    assert any("do not pin it down" in reason for reason in found.refused), found.refused
    assert "optimal" not in as_json(found, [1e12])


def bowls(batches):
    """Losses with the best learning rate at 2 N^-0.5 D^0.25 / 10 and the best batch at 8 (D / 1e6)^0.5."""
    for n in (1e4, 1e5, 1e6):
        for d in (1e6, 1e7):
            rate, batch = 0.2 * n**-0.5 * d**0.25, 8 * (d / 1e6) ** 0.5
            for f in (0.25, 0.5, 1.5, 3.0):
                for g in batches:
                    loss = 0.5 * math.exp(0.1 * math.log(f * 1.1) ** 2 + 0.05 * math.log(g * 0.9) ** 2)
                    yield RunResult(
                        "", n, d, 6 * n * d, loss, rate * f * 1.1, batch * g * 0.9 if len(batches) > 1 else 8
                    )


def test_best_learning_rate_and_batch_follow_their_powers():
    found = fit_learning_rate_and_batch(ScalingData(tuple(bowls((0.3, 0.7, 1.5, 4.0)))))
    assert len(found.minima) == 6 and not found.refused
    assert found.powers["lr"].exponents == pytest.approx({"N": -0.5, "D": 0.25}, abs=1e-6)
    assert found.powers["batch"].exponents == pytest.approx({"N": 0.0, "D": 0.5}, abs=1e-6)
    one = fit_learning_rate_and_batch(ScalingData(tuple(bowls((1.0,)))))
    assert one.powers["lr"](N=1e5, D=1e6) == pytest.approx(0.2 * 1e5**-0.5 * 1e6**0.25)
    few = fit_learning_rate_and_batch(ScalingData(tuple(p for p in bowls((1.0,)) if p.N == 1e4 and p.D == 1e6)))
    assert few.minima and "are needed for a power law" in few.refused[0]


# ScalingData ----------------------------------------------------------------------------------------------------


def test_runs_that_diverged_are_named(tmp_path):
    falling = [1.0 - 0.01 * i for i in range(40)]
    assert divergence(tmp_path, falling, 10) == ""
    assert "not finite" in divergence(tmp_path, [*falling, math.nan], 10)
    assert "no better than it began" in divergence(tmp_path, falling[::-1], 10)
    assert divergence(tmp_path, falling[:10:-1][:19], 10) == ""  # too few reports to tell
    assert "after it had been at" in divergence(tmp_path, [*falling, *[0.9] * 10], 10)
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(30, 40))
    (tmp_path / "skipped.jsonl").write_text(lines)
    assert "10 steps in a row" in divergence(tmp_path, falling, 10)
    assert divergence(tmp_path, falling, 11) == ""


def table(path: Path, N, D, L) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "Model Size", "Training FLOP", "loss"))
        writer.writerows((f"r{i}", n, 6 * n * d, loss) for i, (n, d, loss) in enumerate(zip(N, D, L, strict=True)))
    return path


def test_a_table_is_fitted_and_nothing_is_lost_silently(tmp_path):
    N, D = GRID
    L = noisy(N, D, 1)
    L[4] = math.nan
    text, found = report_fit(table(tmp_path / "losses.csv", N, D, L), draws=100, tracking="none")
    assert found and "left out: r4: diverged" in text and "held out r29" in text
    values = json.loads((tmp_path / "losses-fit" / "fit.json").read_text())
    assert len(values["points"]) == 29
    assert values["law"]["alpha"]["low"] < TRUTH.alpha < values["law"]["alpha"]["high"]
    assert abs(values["held_out"][0]["relative_error"]) < 0.03
    smaller, larger = values["optimal"]
    assert smaller["N"]["value"] < larger["N"]["value"] and smaller["loss"]["value"] > larger["loss"]["value"]
    for name in ("fit.png", "fit.pdf"):
        assert (tmp_path / "losses-fit" / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"N": 0, "D": 1e6, "L": 1}, "N is 0; it must be positive"),
        ({"N": 0, "C": 1e9, "L": 1}, "N is 0; it must be positive"),
        ({"N": 1e4, "D": -1, "L": 1}, "D is -1; it must be positive"),
        ({"N": 1e4, "D": math.inf, "L": 1}, "D is inf; it must be positive"),
        ({"N": 1e4, "D": 1e6, "L": 1, "lr": 0}, "lr is 0; it must be positive"),
        ({"N": 10**400, "D": 1e6, "L": 1}, "int too large to convert to float"),
    ],
)
def test_rows_of_no_law_are_left_out(row, said, tmp_path):
    rows = [{"N": n, "D": d, "L": law} for n, d, law in zip(*GRID, TRUTH.loss(*GRID), strict=True)]
    (tmp_path / "runs.json").write_text(json.dumps([row, *rows]))
    points = read_scaling_data(tmp_path / "runs.json")
    assert points.left_out == (("row 1", said),) and len(points.used) == len(rows)


@pytest.mark.parametrize(("name", "content"), [("t.csv", b"N,D,L\n1,2,\xff\n"), ("t.csv", b"9" * 200_000),
                                               ("t.json", b'["\xff"]'), ("t.jsonl", b'{"\xff": 1}')])  # fmt: skip
def test_a_table_that_is_none_is_named(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert cli.main(["fit", str(tmp_path / name), "--tracking", "none"]) == 2
    said = capsys.readouterr().err
    assert f"msc: {tmp_path / name} is no" in said and said.count("\n") == 1


def test_a_held_out_run_that_is_too_far_away_is_refused_and_the_law_stays(tmp_path):
    N, D = (np.append(values, 30 * values.max()) for values in GRID)
    text, found = report_fit(table(tmp_path / "losses.csv", N, D, noisy(N, D, 1)), draws=50, tracking="none")
    assert found and "refused: held out r30: N·D = " in text and "predictions stop at 100 times" in text
    values = json.loads((tmp_path / "losses-fit" / "fit.json").read_text())
    assert values["held_out"] == [] and "law" in values and len(values["optimal"]) == 2


def test_the_best_learning_rate_of_a_size_and_budget_is_taken(tmp_path):
    rows = [{"N": n, "D": d, "L": 1 + f, "lr": f} for n in (1e4, 1e5) for d in (1e6, 1e7) for f in (0.3, 0.1, 0.2)]
    (tmp_path / "runs.json").write_text(json.dumps([*rows, {"N": 1e4, "L": 2}]))
    points = read_scaling_data(tmp_path / "runs.json")
    assert [point.lr for point in points.used] == [0.1] * 4 and len(points.others) == 8
    assert points.left_out[0][0] == "row 13" and "no D" in points.left_out[0][1]
    assert all(a.N <= b.N for a, b in pairwise(points.used))


def trained(folder: Path, runs: dict[str, list[str]]) -> Path:
    """A sweep folder with finished runs of these settings over one base."""
    base = ["model.channels=3", "model.width=32", "model.depth=2", "train.batch=4", "train.clips=8"]
    for number, (name, own) in enumerate(runs.items()):
        config = load(overrides=[*base, *own])
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(dump(config))
        (folder / name / "log.jsonl").write_text(json.dumps({"clock": config.train.clips, "loss": 1.0}))
        (folder / name / "held_out.jsonl").write_text(json.dumps({"clock": config.train.clips, "mean": 1 + number}))
        (folder / name / "data.json").write_text(json.dumps(asdict(LatentSpace("pixels", 4, 16, 16, 16, 16, 12.0))))
    (folder / "sweep.json").write_text(json.dumps({**{name: {} for name in runs}, "later": {"model.gate": "none"}}))
    return folder


HEADS = "model.scales=[{{heads: {}, window: 2}}, {{heads: {}, space: 2}}]"
SIZED = {
    "small": ["optimizer.lr=0.02", HEADS.format(2, 2), "train.seed=1"],
    "large": ["model.width=64", "model.depth=3", HEADS.format(4, 4), "train.clips=16", "train.batch=8",
              "optimizer.warmup=3", "optimizer.ema_halflife=2", "parallel.sp=2", "metrics.parent=x"],
}  # fmt: skip


def test_a_law_spans_sizes_budgets_and_what_follows_from_them(tmp_path):
    points = read_scaling_data(trained(tmp_path, SIZED))
    assert len(points.used) == 2 and points.left_out == (("later", "not started"),)


def test_a_run_that_was_trained_twice_counts_once(tmp_path):
    """Another seed is another run, another number of ranks or parent in MLflow is not."""
    small = SIZED["small"]
    twins = {"again": [*small, "metrics.parent=y", "parallel.sp=2"], "seed2": [*small, "train.seed=2"]}
    points = read_scaling_data(trained(tmp_path, SIZED | twins))
    assert [point.name for point in points.used] == ["small", "seed2", "large"]
    assert points.left_out[0] == ("again", "the same run as small: no setting differs, nor does the seed")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.gate=none"], r"model.gate \(logits, none\) besides size"),
        ([HEADS.format(3, 1)], "model.scales besides"),
        (["parallel.precision=fp32", "diffusion.shift=7.0"], r"diffusion.shift \(.*7.0\), parallel.precision \(bf16, "),
    ],
)  # fmt: skip
def test_runs_of_different_models_are_refused(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_scaling_data(trained(tmp_path, SIZED | {"other": [HEADS.format(2, 2), *settings]}))


def test_one_model_of_several_is_chosen(tmp_path, capsys):
    each = ((name, own, gate) for name, own in SIZED.items() for gate in ("logits", "none"))
    folder = trained(tmp_path, {f"{name}-gate{gate}": [*own, f"model.gate={gate}"] for name, own, gate in each})

    def chosen(*only):
        points = read_scaling_data(folder, only=only)
        return {point.name for point in (*points.used, *points.others)}, dict(points.left_out)

    assert chosen("model.gate=none") == ({"small-gatenone", "large-gatenone"}, {"later": "not started"})
    assert chosen("*-gatelogits") == ({"small-gatelogits", "large-gatelogits"}, {})
    assert chosen("model.gate=none", "optimizer.lr=2e-2")[0] == {"small-gatenone"}
    for word, said in {"model.gait=1": "no setting model.gait", "model.gate=mix": "no run of", "x*": "no run of",
                       "optimizer.lr=x": "'x' is no value of optimizer.lr"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            chosen(word)
    with pytest.raises(ValueError, match="is a table"):
        read_scaling_data(table(tmp_path / "losses.csv", *GRID, TRUTH.loss(*GRID)), only=["x"])
    assert cli.main(["fit", str(folder), "--tracking", "none"]) == 2
    assert "differ in model.gate (logits, none)" in capsys.readouterr().err
    assert cli.main(["fit", str(folder), "--tracking", "none", "--only", "model.gate=none"]) == 1
    assert "2 runs" in capsys.readouterr().out, "too few for a law, but all that were asked for"


@pytest.mark.slow
@pytest.mark.skipif("CHINCHILLA_CSV" not in os.environ, reason="names no table of Besiroglu et al.; docs/scaling.md")
def test_published_points_give_published_constants():
    """Besiroglu et al. 2024 (arXiv 2404.10102): 240 points, all but the five of highest loss; Huber threshold 1e-3."""
    points = sorted(read_scaling_data(Path(os.environ["CHINCHILLA_CSV"])).used, key=lambda point: point.L)[:240]
    found = fit_law(*(np.array([getattr(point, name) for point in points]) for name in "NDL"), draws=50, delta=1e-3)
    published = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
    errors = {"E": 0.005, "A": 0.05, "B": 0.05, "alpha": 0.01, "beta": 0.01}
    for name, error in errors.items():
        assert getattr(found.law, name) == pytest.approx(getattr(published, name), rel=error), name
