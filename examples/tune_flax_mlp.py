"""Tune a Flax MLP on scikit-learn's digits with Hyperband: 256 networks train as one program.

pip install "jaxhpo[demo]"
python examples/tune_flax_mlp.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo

space = {
    "width": hpo.Int(32, 128, log=True),
    "depth": hpo.Int(1, 3),
    "activation": hpo.Categorical(("relu", "gelu", "silu", "tanh")),
    "dropout": hpo.Float(0.0, 0.5),
    "optimizer": hpo.OneOf(
        sgd={"lr": hpo.Float(1e-2, 1.0, log=True), "momentum": hpo.Float(0.0, 0.99)},
        adam={"lr": hpo.Float(1e-3, 1e-1, log=True), "b1": hpo.Float(0.8, 0.99)},
    ),
}


def model(h):
    return hpo.MLP(10, 128, 3, width=h["width"], depth=h["depth"], activation=h["activation"], dropout=h["dropout"])


def optimizer(h):
    return hpo.select_optimizer(
        h["optimizer"],
        {"sgd": lambda h: optax.sgd(h["lr"], h["momentum"]), "adam": lambda h: optax.adam(h["lr"], h["b1"])},
    )


def main() -> None:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split((x / 16).astype("float32"), y, test_size=0.2, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)

    trainable = hpo.flax_trainable(
        model=model,
        optimizer=optimizer,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(x, y),
        valid=(x_valid, y_valid),
        batch_size=64,
    )
    method = hpo.hyperband(space, max_steps=486, min_steps=6, batch=64, cycles=2)
    result = hpo.minimize(trainable, method, key=jax.random.key(0))

    logits = model(result.best_hparams).apply({"params": result.best_state.params}, x_test)
    print(result.table())
    print(f"test accuracy {jnp.mean(logits.argmax(-1) == y_test):.4f} with {result.best_hparams}")


if __name__ == "__main__":
    main()
