"""The command line: `jaxhpo demo`."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the arguments say; those of the process if not given."""
    parser = argparse.ArgumentParser(prog="jaxhpo", description="Hyperparameter optimization for JAX and Flax.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="tune a Flax MLP on scikit-learn's digits and write a report")
    shown.add_argument("--seed", type=int, default=0, help="of the split and of the study (default: 0)")
    shown.add_argument("--report", default="report.html", metavar="FILE", help="default: report.html")
    parsed = parser.parse_args(arguments)

    from jaxhpo.demo import demo

    demo(parsed.seed, parsed.report)


if __name__ == "__main__":
    main()
