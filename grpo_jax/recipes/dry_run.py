"""What a run would do, by shapes alone: batch arithmetic and the parameter table, nothing compiled."""

import jax

from grpo_jax.batches import pack_shape
from grpo_jax.config import Config
from grpo_jax.data.mixture import SET, components_of
from grpo_jax.models.architecture import llama
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.parallel import check_batch, check_offload, make_mesh, pack_shards, split_processor
from grpo_jax.recipes.grpo import check_inputs, read_rows, show_parameters
from grpo_jax.recipes.mesh import with_mesh
from grpo_jax.terminal import Terminal


def dry_run(config: Config, terminal: Terminal | None = None) -> None:
    """Prints the run's arithmetic; reads data and weights' shapes, so that bad input shows here too."""
    terminal = terminal or Terminal()
    split_processor(config)
    config = with_mesh(config, terminal)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    check_offload(config.mesh.offload, mesh)
    o, rows = config.objective, {split: read_rows(config, split, None) for split in ("train", "eval")}
    terminal.announce(
        config.data.prompts_per_step,
        config.sampler.group_size,
        config.train.steps,
        f"{mesh.size} x {jax.devices()[0].device_kind}",
    )
    minibatch = config.completions // o.minibatches
    shape = pack_shape(config, pack_shards(mesh), mesh.shape["sequence"])
    terminal.say(
        f"{o.num_iterations} epochs x {o.minibatches} minibatches of {minibatch} completions, gradient passes over "
        f"{shape.rows * shape.parts} rows of full length; {config.train.steps * o.num_iterations * o.minibatches} "
        "optimizer updates"
    )
    terminal.say(f"{len(rows['train'])} training rows, {len(rows['eval'])} held out")
    for each in config.data.sets:
        own = sum(row[SET] == each.name for row in rows["train"])
        begins = f", from step {config.late_step + 1} on" if each.late else ""
        earned = components_of(each, config.rewards.names, config.rewards.weights)
        said = ", ".join(f"{name} x {weight:g}" for name, weight in earned.items())
        terminal.say(f"set {each.name}: {own} training rows, weight {each.weight:g}{begins}; {said}")
    terminal.say(
        f"prompts of up to {config.data.max_prompt_length} tokens, completions of up to {config.sampler.max_new_tokens}"
    )
    model = check_inputs(config, rows, mesh)
    if model is not None:
        params = model.params
    else:
        b = config.base
        sizes = llama(
            b.layers,
            vocabulary=b.vocabulary,
            width=b.width,
            heads=b.heads,
            kv_heads=b.kv_heads,
            head_size=b.width // b.heads,
            mlp_width=b.mlp_width,
            rope_theta=b.rope_theta,
            tied=b.tied,
        )
        terminal.say(f"the base is made in the run; its vocabulary is at most {b.vocabulary}")
        params = jax.eval_shape(lambda: init_params(Decoder(sizes), jax.random.key(0)))
    show_parameters(config, params, mesh, terminal)
