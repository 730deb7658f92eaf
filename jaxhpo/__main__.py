"""The command line: `jaxhpo demo` and `jaxhpo compare`."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say; those of the process if not given."""
    parser = argparse.ArgumentParser(prog="jaxhpo", description="Hyperparameter optimization for JAX and Flax.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="tune a Flax MLP on scikit-learn's digits and write a report")
    shown.add_argument("--seed", type=int, default=0, help="of the split and of the study (default: 0)")
    shown.add_argument("--report", default="report.html", metavar="FILE", help="default: report.html")
    every = commands.add_parser("compare", help="compare thirteen methods on the problem of the demo")
    every.add_argument("--seed", type=int, default=0, help="of the split and of the comparison (default: 0)")
    every.add_argument("--report", default="comparison.html", metavar="FILE", help="default: comparison.html")
    every.add_argument("--methods", metavar="NAMES", help="separated by commas (default: all)")
    every.add_argument("--trials", type=int, default=48, help="trainings that each repeat may spend (default: 48)")
    every.add_argument("--repeats", type=int, default=10, help="of each method (default: 10)")
    parsed = parser.parse_args(arguments)

    if parsed.command == "demo":
        from jaxhpo.demo import demo

        demo(parsed.seed, parsed.report)
        return

    from jaxhpo.field import METHODS, show_field

    names = parsed.methods.split(",") if parsed.methods else tuple(METHODS)
    show_field(parsed.seed, parsed.report, names, trials=parsed.trials, repeats=parsed.repeats)


if __name__ == "__main__":
    main()
