"""How good the optima of model-based methods are, one trial or a few at a time.

    python benchmarks/model_quality.py --suite SUITE.py --out OUT.jsonl                # 100 evaluations, one at a time
    python benchmarks/model_quality.py --suite SUITE.py --out OUT.jsonl --batch 8      # eight at a time
    python benchmarks/model_quality.py ... --only random --seeds 5 --name visible

Best-so-far each tenth of the evaluations. The form of suites and results is in `quality.py`.
"""

import argparse

from quality import load_suite, record

import jaxhpo as hpo

METHODS = {
    "tpe": lambda space, batch: hpo.tpe(space, batch=batch),
    "gp_ei": lambda space, batch: hpo.gp_ei(space, batch=batch),
    "forest": lambda space, batch: hpo.bayesian(space, surrogate="forest", batch=batch),
    "random": lambda space, batch: hpo.random(space, batch=batch),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help="Python file with the problems")
    parser.add_argument("--name", default="visible", help="which of its suites")
    parser.add_argument("--out", required=True, help="file to which the rows are appended")
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1, help="trials an ask")
    parser.add_argument("--evaluations", type=int, default=100)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else METHODS
    methods = {name: lambda space, build=METHODS[name]: build(space, options.batch) for name in names}
    problems = load_suite(options.suite, options.name)
    record(problems, methods, options.seeds, options.evaluations, max(options.evaluations // 10, 1), options.out)


if __name__ == "__main__":
    main()
