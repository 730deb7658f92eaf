"""Every benchmark of RESULTS.md, one after the other, with the wall time of each.

    python benchmarks/run_all.py --suite SUITE.py --data DATA --out FOLDER      # all of them, which takes hours
    python benchmarks/run_all.py --quick                                        # in small sizes, to see that they run
    python benchmarks/run_all.py --only gradient_search,pbt                     # by parts of commands or of headings
    python benchmarks/run_all.py --contents                                     # the table of contents of RESULTS.md

Commands that need a suite of problems or data that is not given are left out, and named at the end, as are those that
have failed; then the exit status is 1. Rows go to FOLDER, or to one that is removed at the end.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Benchmark(NamedTuple):
    """A command of a section of RESULTS.md; SUITE.py, DATA, OUT.jsonl and ROWS stand for what is given."""

    section: str
    command: str
    quick: str | None
    """what is appended for small sizes, or `None` where there are none"""
    minutes: str = ""
    """on 2 CPU cores, "busy" where others used them too; empty where it was not timed"""


SUITE = "--suite SUITE.py --out OUT.jsonl"
BENCHMARKS = [
    Benchmark(
        "Which method",
        "python benchmarks/which_method.py --suite SUITE.py --data DATA --rows ROWS",
        "--kinds categorical --only random;tpe --seeds 1",
        "42, busy",
    ),
    Benchmark(
        "Trials per second",
        "python benchmarks/trial_throughput.py",
        "--lanes 8 --steps 20 --asks 1 --peer-trials 2 --repeats 1",
        "0.6",
    ),
    Benchmark(
        "Trials per second",
        "WIDTH=128 python benchmarks/trial_throughput.py",
        "--lanes 8 --steps 20 --asks 1 --peer-trials 2 --repeats 1",
        "0.8",
    ),
    Benchmark("Hyperband: lanes in use, memory", "python benchmarks/hyperband.py", "", "0.2"),
    Benchmark(
        "Generations per second of populations",
        "python benchmarks/generations.py --repeats 3 --seconds 0.3",
        "--only genetic --repeats 1 --seconds 0.05",
    ),
    Benchmark(
        "Quality of populations and local search",
        f"python benchmarks/population_quality.py {SUITE}",
        "--only annealing --seeds 1",
        "1.3",
    ),
    Benchmark(
        "Quality of populations and local search",
        f"python benchmarks/population_quality.py {SUITE} --short",
        "--only annealing --seeds 1",
        "0.6",
    ),
    Benchmark(
        "Quality of populations and local search",
        f"python benchmarks/population_quality.py {SUITE} --short --name visible_hpo",
        "--only annealing --seeds 1",
        "0.7",
    ),
    Benchmark(
        "Quality of model-based search",
        f"python benchmarks/model_quality.py {SUITE}",
        "--only tpe --seeds 1 --evaluations 30",
    ),
    Benchmark(
        "Quality of model-based search",
        f"python benchmarks/model_quality.py {SUITE} --name visible_hpo",
        "--only tpe --seeds 1 --evaluations 30",
    ),
    Benchmark(
        "Quality of model-based search",
        f"python benchmarks/model_quality.py {SUITE} --batch 8",
        "--only tpe --seeds 1 --evaluations 30",
    ),
    Benchmark(
        "Methods that stop trials early",
        f"python benchmarks/fidelity_quality.py {SUITE} --data DATA",
        "--only asha --seeds 1",
        "2.2",
    ),
    Benchmark(
        "Methods that stop trials early",
        "python benchmarks/fidelity_quality.py --data DATA --taskset --seeds 20",
        "--seeds 1",
        "0.2",
    ),
    Benchmark(
        "Share of the lanes that train",
        "python benchmarks/lanes.py",
        "--parts share,overhead --rounds 5 --width 16 --repeats 1",
    ),
    Benchmark("Population-based training", "python benchmarks/pbt.py", "--seeds 1", "1.1"),
    Benchmark("Hypergradients", "python benchmarks/hypergradients.py", "--parts time --steps 100 --repeats 1", "0.6"),
    Benchmark("Hypergradients", "python benchmarks/hypertuning.py", "--trials 20 --steps 20 --seeds 0"),
    Benchmark("Data cleaning", "python benchmarks/data_cleaning.py", "--splits 1 --outer 3", "0.4"),
    Benchmark(
        "Data cleaning", "python benchmarks/data_cleaning.py --data mnist --folder DATA", "--splits 1 --outer 3", "1.7"
    ),
    Benchmark(
        "Descent against search",
        "python benchmarks/gradient_search.py",
        "--seeds 1 --multiple 4 --methods trust_region",
        "0.5",
    ),
    Benchmark(
        "Architecture search",
        "python benchmarks/nas_bench.py --folder DATA",
        "--only random;tpe --searches 10 --seeds 4 --evaluations 20",
    ),
    Benchmark("A learned schedule", "python benchmarks/controller.py", "--lanes 8 --runs 4 --trials 4 --keys 2"),
    Benchmark(
        "A learned schedule", "python benchmarks/controller.py --every 20", "--lanes 8 --runs 4 --trials 4 --keys 2"
    ),
    Benchmark(
        "Architectures in lanes",
        "python benchmarks/nas_training.py",
        "--parts lanes --lanes 4 --alone 1 --repeats 1 --steps 5",
    ),
    Benchmark(
        "Differentiable architecture search",
        "python benchmarks/darts.py --steps 300 --channels 6",
        "--seeds 1 --steps 10 --channels 2 --random 2",
    ),
    Benchmark("Devices and processes", "pytest -q tests/test_mesh.py", None),
    Benchmark(
        "Time to ask",
        "python benchmarks/ask_latency.py",
        "--only tpe --parts latency --asks 4 --slow-asks 1 --sizes 20",
    ),
    Benchmark(
        "The methods of the field",
        "python -m jaxhpo compare --report OUT.html",
        "--methods random,tpe --trials 4 --repeats 2",
        "3.0",
    ),
    Benchmark("The demo", "python -m jaxhpo demo --seed 0 --report OUT.html", None, "0.4"),
]


def contents():
    """The table of contents of RESULTS.md."""
    lines = ["| section | command | minutes |", "|---|---|---|"]
    before = None
    for b in BENCHMARKS:
        anchor = "".join(c for c in b.section.lower().replace(" ", "-") if c.isalnum() or c == "-")
        section = "" if b.section == before else f"[{b.section}](#{anchor})"
        lines.append(f"| {section} | `{b.command}` | {b.minutes or 'not timed'} |")
        before = b.section
    return "\n".join(lines)


def filled(command, places):
    """The command with what the placeholders stand for, or the placeholder that nothing is given for."""
    for name, value in places.items():
        if name in command and value is None:
            return None, name
        command = command.replace(name, shlex.quote(str(value)))
    return command, None


def run(benchmark, places, quick):
    """The seconds that it took, or why there are none, and whether it failed."""
    command, missing = filled(benchmark.command, places)
    if missing:
        return f"left out: no {missing}", False
    if quick:
        if benchmark.quick is None:
            return "left out: it has no small size", False
        command = " ".join([command, *map(shlex.quote, benchmark.quick.split())])
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begun = time.perf_counter()
    status = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode
    took = f"{time.perf_counter() - begun:.0f} s"
    return (f"FAILED with status {status} after {took}", True) if status else (took, False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", help="Python file with the problems, as in `quality.py`")
    parser.add_argument("--data", help="folder with tables and surrogates")
    parser.add_argument("--out", help="folder for the rows that are written")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", help="parts of commands or of headings, separated by commas")
    parser.add_argument("--contents", action="store_true", help="print the table of contents and end")
    options = parser.parse_args()
    if options.contents:
        print(contents())
        return
    chosen = [
        b
        for b in BENCHMARKS
        if not options.only or any(part in f"{b.section} {b.command}" for part in options.only.split(","))
    ]
    absolute = lambda path: path and str(Path(path).resolve())  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(absolute(options.out) or scratch)
        out.mkdir(parents=True, exist_ok=True)
        outcomes, any_failed = [], False
        for number, benchmark in enumerate(chosen):
            print(f"\n== {benchmark.section}: {benchmark.command}", flush=True)
            places = {
                "SUITE.py": absolute(options.suite),
                "DATA": absolute(options.data),
                "OUT.jsonl": out / f"{number}.jsonl",
                "OUT.html": out / f"{number}.html",
                "ROWS": out / "rows",
            }
            outcome, has_failed = run(benchmark, places, options.quick)
            outcomes.append(outcome)
            any_failed |= has_failed
            print(f"== {outcome}", flush=True)
    print("\n| command | took |\n|---|---|")
    for benchmark, outcome in zip(chosen, outcomes, strict=True):
        print(f"| `{benchmark.command}` | {outcome} |")
    if any_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
