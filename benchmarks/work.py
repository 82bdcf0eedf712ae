"""The arithmetic of one training step on a frozen backbone: multiply-adds of the matrix products, and no others.

Counted are the forward pass and the gradients of activations; weights that are frozen have no gradient. A product with
a weight costs once more on the way back, a product of two activations twice. Products on which no trained number
depends have no way back. The codebooks and everything that is no matrix product are left out.
"""

from __future__ import annotations

from typing import Any


def t5_step(config: Any, batch: int, source: int, target: int) -> int:
    """Return the multiply-adds of a step.

    Args:
        config: of the T5 model.
        batch: B, rows.
        source: P+T, slots of the encoder.
        target: slots of the decoder.
    """
    width, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
    products = 3 if config.is_gated_act else 2
    encoded, decoded = batch * source, batch * target
    encoder_weights = encoded * (4 * width * inner + products * width * hidden)
    encoder_scores = 2 * batch * source * source * inner
    own_weights, own_scores = decoded * 4 * width * inner, 2 * batch * target * target * inner
    cross_weights = decoded * 2 * width * inner + encoded * 2 * width * inner
    cross_scores = 2 * batch * target * source * inner
    forward_weights = decoded * products * width * hidden
    decoder = 2 * (own_weights + cross_weights + forward_weights) + 3 * (own_scores + cross_scores)
    layers = config.num_layers * (2 * encoder_weights + 3 * encoder_scores) + config.num_decoder_layers * decoder
    # The first layer's self-attention and cross-attention queries see no trained number.
    untouched = own_weights + 2 * own_scores + decoded * width * inner + cross_scores // 2
    return layers - untouched + 2 * decoded * width * config.vocab_size


def llama_step(config: Any, batch: int, prompt: int, text: int, kept: int, shared: bool = True) -> int:
    """Return the multiply-adds of a step.

    Args:
        config: of the Llama model.
        batch: B, rows.
        prompt: P.
        text: T.
        kept: logits per row.
        shared: whether the prompt goes through the model once, not once per row.
    """
    width, hidden, head = config.hidden_size, config.intermediate_size, config.head_dim
    inner, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
    per_token = 2 * width * inner + 2 * width * narrow + 3 * width * hidden
    first = width * inner + 2 * width * narrow
    prompts = 1 if shared else batch
    tokens = prompts * prompt + batch * text
    scores = 2 * inner * (prompts * prompt * prompt // 2 + batch * (text * prompt + text * text // 2))
    # The first layer's queries, keys and values of the text see no trained number.
    layers = config.num_hidden_layers * (2 * tokens * per_token + 3 * scores) - batch * text * first
    if shared:
        # Of the prompt's last layer only keys and values are read.
        layers -= 2 * prompt * (2 * width * inner + 3 * width * hidden) + 3 * inner * prompt * prompt
    return layers + 2 * batch * kept * width * config.vocab_size
