"""prototype of bayesian"""
import functools, math, os, json
from typing import NamedTuple
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jaxhpo import history as hist
from jaxhpo.method import *
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import latin_hypercube, reflect, another_level, levels
from jaxhpo.sequential.surrogate import gp
from jaxhpo.sequential.surrogate.kernel import features

CFG = dict(M=8, leaps=10, cand=1000, starts=8, steps=30, startup=8, period=1, center=0, reps=1)
CFG |= json.loads(os.environ.get("BOCFG", "{}"))

def log_h(z):
    # log(phi(z) + z Phi(z))
    c1 = math.log(2 * math.pi) / 2
    direct = jnp.log(jnp.maximum(jnp.exp(-z * z / 2 - c1) + z * jax.scipy.special.ndtr(z), 1e-30))
    zs = jnp.minimum(z, -1.0)
    # Phi/phi = mills; phi + z Phi = phi(1 + z*Phi/phi)
    logphi = -zs * zs / 2 - c1
    ratio = jnp.exp(jax.scipy.special.log_ndtr(zs) - logphi)
    inner = 1 + zs * ratio
    zz = jnp.minimum(z, -8.0)
    asym = -2 * jnp.log(-zz) + jnp.log1p(-3 / zz**2)
    mid = logphi + jnp.log(jnp.maximum(inner, 1e-6))
    return jnp.where(z > -1, direct, jnp.where(z > -8, mid, -zz * zz / 2 - c1 + asym))

def log_ei(mean, std, best):
    return jnp.log(std) + log_h((best - mean) / std)

class State(NamedTuple):
    history: hist.History
    start: jax.Array
    fit: gp.Fit
    asked: Count

@functools.lru_cache(maxsize=64)
def bo(space, batch=1):
    space = Space.of(space); d = space.dims
    M = CFG["M"]
    startup = CFG["startup"] or d + 2
    def init(key, settings=None):
        k1, k2 = jax.random.split(key)
        s = latin_hypercube(k1, startup, d)
        if CFG["center"]: s = jnp.concatenate([jnp.full((1, d), 0.5, s.dtype), s])[:startup]
        return State(hist.empty(d, 64, 2), s, gp.init_fit(k2, space, M), count())
    def model(key, h, fit):
        data = gp.data_of(space, features(space, h.unit), h.losses, h.mask)
        for i in range(CFG["reps"]):
            fit = gp.hmc(jax.random.fold_in(key, i), space, fit, data, CFG["leaps"])
        return fit
    def propose(h, fit, key):
        kf, kc, kl, kg = jax.random.split(key, 4)
        fit = lax.cond(h.count.value % CFG["period"] == 0, lambda f: model(kf, h, f), lambda f: f, fit)
        x = features(space, h.unit)
        post = gp.condition(space, fit, x, gp.data_of(space, x, h.losses, h.mask))
        def acq(c):
            m, s = gp.predict(space, post, features(space, c))
            v = log_ei(m, s, post.best[:, None])
            return jax.scipy.special.logsumexp(v, axis=0)
        n = CFG["cand"]
        k1, k2, k3, k4, k5 = jax.random.split(kc, 5)
        uni = jax.random.uniform(k1, (n * d,), x.dtype).reshape(n, d)
        _, top = lax.top_k(-hist_rank(h), 8)
        base = h.unit[top][jnp.arange(n) % 8]
        sc = jnp.exp(jnp.log(10.0) * jax.random.uniform(k2, (n,), x.dtype, -3.0, -0.3))[:, None]
        ch = jax.random.uniform(k3, (n * d,), x.dtype).reshape(n, d) < jax.random.uniform(k5, (n,), x.dtype, 1.0 / d, 1.0)[:, None]
        noise = jax.random.normal(k4, (n * d,), x.dtype).reshape(n, d)
        local = jnp.where(ch, reflect(base + sc * noise), base)
        jump = (jax.random.uniform(k5, (n * d,), x.dtype).reshape(n, d) < 0.3) & ch & jnp.asarray(space.levels > 0)
        local = jnp.where(jump, uni, local)
        pool = jnp.concatenate([uni, local])
        val = acq(pool)
        S = CFG["starts"]
        bv, bi = lax.top_k(val, S)
        q = pool[bi]
        g = jax.grad(lambda q: acq(q).sum())
        T = CFG["steps"]
        free = jnp.asarray(space.levels == 0, x.dtype)
        big = jnp.asarray((space.levels == 0) | ((space.levels > 4) & ~space.categorical), x.dtype)
        def step(i, c):
            q, m, v, bq, bv = c
            gr = jnp.where(jnp.isfinite(g(q)), g(q), 0) * big
            m = 0.8 * m + 0.2 * gr; v = 0.95 * v + 0.05 * gr**2
            mh = m / (1 - 0.8 ** (i + 1)); vh = v / (1 - 0.95 ** (i + 1))
            lr = 0.05 * jnp.exp(-i / T * math.log(100.0))
            q = jnp.clip(q + lr * mh / (jnp.sqrt(vh) + 1e-8), 0, 1)
            return q, m, v, bq, bv
        q1, *_ = lax.fori_loop(0, T, step, (q, jnp.zeros_like(q), jnp.zeros_like(q), q, bv))
        if (space.levels > 0).any():
            # neighbours of starts
            nb = 16 * S
            src = jnp.tile(q1, (16, 1))
            ks = jax.random.split(kl, 3)
            one = jax.nn.one_hot(jax.random.randint(ks[0], (nb,), 0, d), d, dtype=bool)
            u = jax.random.uniform(ks[1], (nb * d,), x.dtype).reshape(nb, d)
            oth = another_level(space, src, u)
            q1 = jnp.concatenate([q1, jnp.where(one, oth, src)])
        allq = jnp.concatenate([q, q1])
        allv = acq(allq)
        fs = features(space, allq)
        dup = (jnp.abs(fs[:, None] - x[None]).max(-1) < 1e-6) & h.mask
        allv = jnp.where(dup.any(1), -1e9, allv)
        pick = allq[jnp.argmax(jnp.where(jnp.isnan(allv), -jnp.inf, allv))]
        return pick[None], fit
    def hist_rank(h):
        return jnp.where(h.mask, h.losses, jnp.inf)
    def ask(key, state, pending=None):
        a = state.asked.value
        def first(h, fit, key):
            return state.start[jnp.minimum(a, startup - 1)][None], fit
        unit, fit = lax.cond(a < startup, first, lambda h, f, k: hist.on_bucket(propose, h, f, k, growth=2), state.history, state.fit, key)
        return black_box(space, unit, a), state._replace(asked=Count(a + batch), fit=fit)
    def tell(state, trials, losses, gradients=None):
        return state._replace(history=hist.append(state.history, trials.unit, losses, trials.active))
    def reserve(state, capacity):
        return state._replace(history=hist.reserve(state.history, capacity, 2))
    return Method("proto", space, (), init, ask, tell, batch, reserve=reserve)
