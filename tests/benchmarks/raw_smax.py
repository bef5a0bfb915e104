"""SMAX stepped as JaxMARL's baselines do: its own `step`, which resets what has ended, compiled."""


def raw_stepping(name, copies):
    """A function that makes so many steps of all copies, each waited for."""
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    env = HeuristicEnemySMAX(scenario=map_name_to_scenario(name))
    key, start, draw = jax.random.split(jax.random.PRNGKey(0), 3)
    keys = jax.random.split(key, copies)
    drawn = [
        {
            agent: jax.random.randint(jax.random.fold_in(of_step, i), (copies,), 0, space.n)
            for i, (agent, space) in enumerate(env.action_spaces.items())
        }
        for of_step in jax.random.split(draw, 10)
    ]

    @jax.jit
    def forward(keys, state, actions):
        keys, now = jax.numpy.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        return keys, *jax.vmap(env.step)(now, state, actions)

    _, state = jax.jit(jax.vmap(env.reset))(jax.random.split(start, copies))
    made = 0

    def step(steps):
        nonlocal keys, state, made
        for _ in range(steps):
            keys, observations, state, *rest = forward(keys, state, drawn[made % len(drawn)])
            jax.block_until_ready((observations, rest))
            made += 1

    return step
