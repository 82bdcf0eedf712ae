# %% [markdown]
# # One batch, three tasks, one frozen model
#
# Three adapters of three methods, each trained for another task on the same small T5, are loaded beside each other.
# Every row of one batch then uses its own adapter, and one row none at all. Run it in a clone of the repository, as a
# script or cell by cell: `python examples/three_tasks.py`.

# %%
from pathlib import Path

import torch
from peft import PeftModel

import softprompts.peft  # noqa: F401  (registers the adapter type)
from softprompts.backbone import load_backbone
from softprompts.config import ModelSettings

RESULTS = Path(__file__).parent.parent / "results" / "t5-nano"
ADAPTERS = {
    "sentiment": RESULTS / "glue-sst2" / "accept" / "seed-1" / "adapter",
    "entailment": RESULTS / "superglue-cb" / "dept" / "seed-1" / "adapter",
    "answered": RESULTS / "glue-qnli" / "adept" / "seed-1" / "adapter",
}
MEANING = {
    "sentiment": {"0": "negative", "1": "positive"},
    "entailment": {"0": "entailment", "1": "contradiction", "2": "neutral"},
    "answered": {"0": "the sentence answers the question", "1": "it does not"},
}

# %% [markdown]
# The backbone is loaded once; an adapter adds a file of about 40 KB.

# %%
t5 = load_backbone(ModelSettings(name="t5-nano"))
first, *others = ADAPTERS
model = PeftModel.from_pretrained(t5.model, str(ADAPTERS[first]), adapter_name=first)
for name in others:
    model.load_adapter(str(ADAPTERS[name]), name)
for name, folder in ADAPTERS.items():
    config = model.peft_config[name]
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(
        f"{name}: {config.softprompt.name}, {config.softprompt.num_trainable(config.width):,} numbers, {size:,} bytes"
    )

# %% [markdown]
# One batch: a task per row, in any order, and the bare backbone for one row.

# %%
BATCH = [
    ("sentiment", "sentence: a warm , funny and deeply moving film"),
    ("entailment", "premise: Nobody had lived in the valley for years. hypothesis: the valley was inhabited"),
    ("sentiment", "sentence: a dull and lifeless mess"),
    ("answered", "question: In which year was she born? sentence: She was born in Lisbon in 1931."),
    ("__base__", "sentence: a dull and lifeless mess"),
    ("entailment", "premise: A: Do you think it will rain? B: I know that it will rain. hypothesis: it will rain"),
]
names, texts = [name for name, _ in BATCH], [text for _, text in BATCH]
inputs = t5.tokenizer(texts, padding=True, return_tensors="pt").to(t5.model.device)
with torch.inference_mode():
    written = model.generate(**inputs, adapter_names=names, max_new_tokens=4, do_sample=False)
for (name, text), answer in zip(BATCH, t5.tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
    print(f"{name:>10}  {text[:60]:60}  {answer!r} {MEANING.get(name, {}).get(answer, '')}")

# %% [markdown]
# The same as switching adapters for every row, to the last bits of fp32, but the backbone runs once.

# %%
start = torch.full((len(BATCH), 1), t5.model.config.decoder_start_token_id, device=t5.model.device)
with torch.inference_mode():
    together = model(**inputs, decoder_input_ids=start, adapter_names=names).logits
    worst = 0.0
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                logits = model(**alone, decoder_input_ids=start[:1]).logits
        else:
            model.set_adapter(name)
            logits = model(**alone, decoder_input_ids=start[:1]).logits
        worst = max(worst, (logits - together[row]).abs().max().item())
print(f"largest difference of a logit from the row alone: {worst:.1e}")
