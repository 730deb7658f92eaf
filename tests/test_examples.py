"""The examples run, in a small setting, and reach what they claim."""

import importlib.util
from pathlib import Path

import jax


def load(name):
    """The module of an example."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_swarm_of_networks(tmp_path, capsys):
    out = tmp_path / "swarm.png"
    arguments = ["--particles", "8", "--rounds", "4", "--steps", "60", "--grid", "0", "--out"]
    outcome = load("pso_flax").main([*arguments, str(out)])
    assert outcome.networks == 32 and outcome.compiles == 1
    assert outcome.accuracy > 0.88
    assert out.stat().st_size > 10_000
    assert f"test accuracy {outcome.accuracy:.4f}" in capsys.readouterr().out


def test_networks_on_many_devices(capsys):
    example = load("many_devices")
    result = example.search(example.parse(["--max-steps", "27"]))
    assert result.best_loss < 0.6 and result.trials.steps.max() == 27
    assert f"{jax.device_count()} devices of 1 processes" in capsys.readouterr().out


def test_a_population_of_cnns_and_its_schedule(capsys):
    outcome = load("pbt_cnn").main(["--population", "5", "--every", "30", "--steps", "180"])
    schedule = outcome.schedule
    assert schedule.stop[-1] <= 180 and (schedule.stop % 30 == 0).all()
    assert outcome.accuracy > 0.75 and outcome.retrained > 0.6
    shown = capsys.readouterr().out
    assert str(schedule.table()) in shown and f"test accuracy {outcome.accuracy:.4f}" in shown


def test_a_language_model(capsys):
    small = ["--characters", "8000", "--lanes", "4", "--max-steps", "27", "--steps", "240"]
    outcome = load("bohb_char_lm").main(small)
    assert outcome.bits < outcome.chance - 0.5 and outcome.result.trials.steps.max() == 27
    assert f"{outcome.bits:.3f} bits a character" in capsys.readouterr().out


def test_a_weight_decay_for_each_parameter(capsys):
    outcome = load("per_parameter_decay").main(["--trials", "20", "--rounds", "12", "--steps", "100"])
    assert outcome.each < outcome.single - 0.01
    assert sum(x.size for x in jax.tree.leaves(outcome.decay)) == 4810
    assert f"4810 decays: test cross-entropy {outcome.each:.4f}" in capsys.readouterr().out


def test_a_learning_rate_for_each_step(capsys):
    outcome = load("learning_rate_schedule").main([])
    assert outcome.tuned < outcome.constant and outcome.rates.shape == (60,)
    assert outcome.rates[-1] < outcome.rates.max() / 2
    assert f"a rate for each step: test cross-entropy {outcome.tuned:.4f}" in capsys.readouterr().out


def test_moved_labels_are_found(capsys):
    outcome = load("data_cleaning").main(["--rounds", "20", "--steps", "40"])
    assert outcome.auroc > 0.95 and outcome.found > max(outcome.clean, outcome.noisy)
    assert f"area under the ROC curve {outcome.auroc:.4f}" in capsys.readouterr().out


def test_a_cnn_is_found_and_leaves_without_masks(tmp_path, capsys):
    out = tmp_path / "cnn.svg"
    outcome = load("nas_cnn").main(["--channels", "6", "--batch", "9", "--max-steps", "135", "--out", str(out)])
    assert outcome.architectures > 60 and outcome.accuracy > 0.75
    blocks = [block for stage in outcome.module.stages for block in stage]
    inputs = [1, *(block.width for block in blocks)]
    sizes = [(n * block.kernel**2 + 1) * block.width for n, block in zip(inputs, blocks, strict=False)]
    assert outcome.parameters == sum(sizes) + (inputs[-1] + 1) * 10
    assert out.read_text().count("<path") > 10
    assert f"test accuracy {outcome.accuracy:.4f}" in capsys.readouterr().out


def test_a_policy_that_sets_the_learning_rate(tmp_path, capsys):
    out = tmp_path / "policy.msgpack"
    small = ["--lanes", "32", "--runs", "60", "--steps", "60", "--every", "6", "--out", str(out)]
    outcome = load("learned_schedule").main(small)
    # With so little to learn from it is not better yet, but it has found that rates are to fall.
    assert outcome.learned < 1.25 * outcome.constant and outcome.rates.shape == (10,)
    assert outcome.rates[-1] < outcome.rates[0] / 2
    assert out.stat().st_size > 5_000
    assert f"the learned policy: validation loss {outcome.learned:.4f}" in capsys.readouterr().out
