"""Every Python snippet of the README runs, one after the other."""

import re
from pathlib import Path

import jax
import numpy as np


def test_snippets_run_as_they_stand(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    commands = re.findall(r"```bash\n(.*?)```", text, re.S)
    demo, compared, tests, processes = commands
    assert "jaxhpo demo" in demo and compared.strip() == "jaxhpo compare" and tests.strip().endswith("pytest")
    assert processes.count("python examples/many_devices.py --processes 2 --process") == 2
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 8
    names: dict = {}
    exec(snippets[0], names)
    assert names["result"].best_loss < 0.01 and "adam" in capsys.readouterr().out
    exec(snippets[1], names)
    assert names["result"].best_loss < 0.8 and len(jax.tree.leaves(names["result"].best_state.params)) == 8
    exec(snippets[2], names)
    losses = {row[0]: float(row[3]) for row in names["comparison"].rows()[1]}
    assert losses["tpe"] < losses["random"] < losses["hyperband"] < 1.5 and "ms per ask" in capsys.readouterr().out
    exec(snippets[3], names)
    assert names["traces"].losses.shape == (512, 16, 16) and np.isfinite(names["traces"].losses).all()
    for snippet in snippets[4:]:
        exec(snippet, names)
    assert abs(names["result"].best_hparams["l2"] - 1) < 0.02, "what descends through training comes last"
