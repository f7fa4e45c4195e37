"""What experiments with several arms share: running every arm by seed, a table, bars, and a record of it all.

Each run has a folder of its own below --out, and is resumed when the command is given again; finished ones only print.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seeds import REPOSITORY, run, spread, surroundings

# arm -> seed ("-" where nothing is random) -> metric -> value
Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Arm:
    """One way to a model, evaluated on the test split.

    options: laid over the project file, with {seed} in place of the seed. trained: by every seed; else it is only
    evaluated, once, or by every seed where an option speaks of {seed}.
    """

    title: str
    cfg_path: str
    options: tuple[str, ...] = ()
    trained: bool = False

    def with_seed(self, seed: int) -> list[str]:
        """The options of one seed's run."""
        return [option.format(seed=seed) for option in self.options]

    @property
    def random(self) -> bool:
        """Whether seeds differ."""
        return self.trained or any("{seed}" in option for option in self.options)


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared by some metrics of the test split.

    metrics: name in the log -> name in table and picture. what: the axis they are drawn on.
    """

    name: str
    arms: Mapping[str, Arm]
    metrics: Mapping[str, str]
    what: str

    def main(self, description: str | None) -> Results:
        """The command: run, print, write <name>.json and <name>.svg; what was found."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--arms", nargs="+", choices=self.arms, default=list(self.arms))
        parser.add_argument("--out", type=Path, default=Path("output") / self.name)
        parser.add_argument(
            "--options",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="for every run, below each arm's own",
        )
        args = parser.parse_args()
        results = {name: self.run(name, args.seeds, args.out, args.options) for name in args.arms}
        print("\n".join(self.table(results)))
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"command": " ".join(sys.argv), **surroundings(), "seeds": args.seeds, "arms": results}
        (args.out / f"{self.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        self.draw(results, args.out / f"{self.name}.svg")
        return results

    def run(
        self, name: str, seeds: Sequence[int], out: Path, options: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Metrics of an arm by seed, "-" where nothing is random."""
        arm = self.arms[name]
        if not arm.random:
            return {"-": evaluate(arm, out / name, [*options, *arm.options])}
        results = {}
        for seed in seeds:
            folder, own = out / name / str(seed), [*options, *arm.with_seed(seed)]
            if arm.trained:
                command("train.py", arm, folder, [*own, f"run.seed={seed}"])
                # The run's own weights, all of them, and not those it began with.
                own.append(f"model.pretrained={folder}")
            results[str(seed)] = evaluate(arm, folder, own)
        return results

    def table(self, results: Results) -> list[str]:
        """Mean and standard deviation of each metric, an arm a line."""
        width = max(len(self.arms[name].title) for name in results)
        titles = "  ".join(f"{title:>13}" for title in self.metrics.values())
        lines = [f"{self.what:<{width}}  {titles}  seeds"]
        for name, runs in results.items():
            cells = []
            for metric in self.metrics:
                mean, deviation = spread([metrics[metric] for metrics in runs.values()])
                cells.append(f"{mean:.3f} ± {deviation:.3f}" if len(runs) > 1 else f"{mean:.3f}")
            seeds = str(len(runs)) if self.arms[name].random else "-"
            shown = "  ".join(f"{cell:>13}" for cell in cells)
            lines.append(f"{self.arms[name].title:<{width}}  {shown}  {seeds:>5}")
        return lines

    def draw(self, results: Results, path: Path) -> None:
        """Bars of the means, with the standard deviation over seeds."""
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
        width = 0.8 / len(results)
        for number, (name, runs) in enumerate(results.items()):
            values = ([metrics[metric] for metrics in runs.values()] for metric in self.metrics)
            means, deviations = zip(*map(spread, values), strict=True)
            places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(self.metrics))]
            axes.bar(places, means, width, yerr=deviations, capsize=2, label=self.arms[name].title)
        axes.set_xticks(range(len(self.metrics)), list(self.metrics.values()))
        axes.set_ylim(0, 1)
        axes.set_ylabel(f"{self.what} (test)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, format="svg")


def evaluate(arm: Arm, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """The metrics of the test split."""
    command("evaluate.py", arm, folder, options)
    metrics: dict[str, float] = json.loads((folder / "evaluation" / "metrics.json").read_text())["metrics"]
    return metrics


def command(script: str, arm: Arm, folder: Path, options: Sequence[str]) -> None:
    """Run one of the repository's commands for an arm."""
    run(script, str(REPOSITORY / arm.cfg_path), folder, options)
