"""The data that travels through a step: prompts in, rollout out.

Axes: B batch of completions, N prompts, G group (B = N x G, completion b belongs to prompt b // G),
P prompt length, T completion length, C reward components.
"""

from collections.abc import Mapping

import flax.struct
from jaxtyping import Array, Bool, Float, Int, Shaped


class RowRewards(flax.struct.PyTreeNode):
    """Which rewards rows have, where not all have the same.

    Attributes:
      member: number of the row's prompt set.
      applies: 1 where a component is asked about the row, else 0.
      weights: weights of the components, 0 where they do not apply.
    """

    member: Int[Array, "*N"]
    applies: Float[Array, "*N C"]
    weights: Float[Array, "*N C"]


class Prompts(flax.struct.PyTreeNode):
    """N prompts as the host hands them in.

    Attributes:
      tokens: ids, padded on the LEFT to P; what stands in the padding has no influence.
      lengths: tokens of each prompt.
      draw: draw number, the place of the prompt in the order of all prompts ever drawn in the run.
      row: index of the prompt's row in its dataset; host rewards look text and columns up by it.
      weight: 1, or 0 for filler rows that complete a batch.
      columns: what in-graph rewards need beside the tokens, each [N, ...] (such as the answer's bytes).
      rewards: which rewards each prompt has; None: all have those of the config.
      first_sample: index of each group's first completion among the samples of its prompt; None: 0.
    """

    tokens: Int[Array, "N P"]
    lengths: Int[Array, "N"]
    draw: Int[Array, "N"]
    row: Int[Array, "N"]
    weight: Float[Array, "N"]
    columns: Mapping[str, Shaped[Array, "N ..."]]
    rewards: RowRewards | None = None
    first_sample: Int[Array, "N"] | None = None


class Scores(flax.struct.PyTreeNode):
    """Rewards of B completions by component.

    Attributes:
      values: score of each component; 0 where it does not apply.
      valid: 1 where the component applies, else 0.
      failed: True when a host reward failed; the update is then skipped and the host raises.
      step_rewards: rewards of steps, each at the token that ends it; None: the outcome alone is rewarded.
      step_ends: 1 at the tokens that end a step, else 0.
      rewards: which rewards each row has; None: all have those of the config.
    """

    values: Float[Array, "B C"]
    valid: Float[Array, "B C"]
    failed: Bool[Array, ""]
    step_rewards: Float[Array, "B T"] | None = None
    step_ends: Float[Array, "B T"] | None = None
    rewards: RowRewards | None = None


class Rollout(flax.struct.PyTreeNode):
    """B sampled completions with the log-probabilities of the law that drew them.

    Attributes:
      tokens: completion ids, padded on the right to T.
      lengths: tokens of each completion, the end token included.
      logps: log-probability of each token under the full softmax at the sampling temperature,
        the denominator of the ratio; 0 in the padding.
      sampled_logps: the same under the law really drawn from (after top-k and top-p).
      ended: True where an end token or a stop string closed the completion, False where the length budget did.
      started: passes through the decoder before its first token; 0 for all where every row has a slot of its own.
      mask: tokens that count in the loss (1) or not (0), made from the lengths.
      weight: 1, or 0 for rows that count nowhere.
      draw: draw number of the prompt.
      group: number of the prompt in its batch; rows of one group are adjacent.
      prompt_tokens: the prompt of each row, padded on the left to P.
      prompt_lengths: its length.
      scores: rewards by component, once scored.
      advantages: of each token, once scored.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    logps: Float[Array, "B T"]
    sampled_logps: Float[Array, "B T"]
    ended: Bool[Array, "B"]
    started: Int[Array, "B"]
    mask: Float[Array, "B T"]
    weight: Float[Array, "B"]
    draw: Int[Array, "B"]
    group: Int[Array, "B"]
    prompt_tokens: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B"]
    scores: Scores | None = None
    advantages: Float[Array, "B T"] | None = None
