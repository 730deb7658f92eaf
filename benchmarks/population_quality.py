"""How good the optima of population and local search are.

    python benchmarks/population_quality.py --suite SUITE.py --out OUT.jsonl                    # 5,000 evaluations
    python benchmarks/population_quality.py --suite SUITE.py --out OUT.jsonl --short            # 100 evaluations
    python benchmarks/population_quality.py ... --only annealing,genetic --seeds 3 --name visible

Without `--short`: populations of 50, best-so-far each 500 evaluations. With it: as few trials an ask as a method
likes, best-so-far each 10. The form of suites and results is in `quality.py`.
"""

import argparse

from quality import load_suite, record

import jaxhpo as hpo

LONG = {
    "differential_evolution": lambda space: hpo.differential_evolution(space, population=50, trials=5000, batch=10),
    "particle_swarm": lambda space: hpo.particle_swarm(space, particles=50, batch=50),
    "cma_es": lambda space: hpo.cma_es(space, population=50, batch=50),
    "genetic": lambda space: hpo.genetic(space, population=50, batch=50),
    "annealing": lambda space: hpo.annealing(space, chains=50, batch=50),
    "coordinate_descent": lambda space: hpo.coordinate_descent(space, batch=50),
}
SHORT = {
    "particle_swarm": lambda space: hpo.particle_swarm(space, particles=10, batch=1),
    "cma_es": lambda space: hpo.cma_es(space, batch=1),
    "annealing": lambda space: hpo.annealing(space, chains=1, batch=1),
    "coordinate_descent": lambda space: hpo.coordinate_descent(space, batch=2),
    "random": lambda space: hpo.random(space, batch=10),
    "quasirandom": lambda space: hpo.quasirandom(space, batch=10),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help="Python file with the problems")
    parser.add_argument("--name", default="visible", help="which of its suites")
    parser.add_argument("--out", required=True, help="file to which the rows are appended")
    parser.add_argument("--short", action="store_true", help="100 evaluations")
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    methods = SHORT if options.short else LONG
    if options.only:
        methods = {name: methods[name] for name in options.only.split(",")}
    evaluations, every = (100, 10) if options.short else (5000, 500)
    record(load_suite(options.suite, options.name), methods, options.seeds, evaluations, every, options.out)


if __name__ == "__main__":
    main()
