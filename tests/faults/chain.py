"""The pipeline that the fault tests disturb: every kind of stage that works in units, in several shards, in some seconds."""

DOCS, FILES = 360, 4

CHAIN = """\
root: {root}
engine: {{name: {engine}, workers: {workers}, memory_gb: 1{scratch}}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
  signals: {{}}
  pii: {{}}
  exact: {{}}
  minhash: {{}}
  select@final:
    duplicates: [exact, minhash]
    prefer: [-signals.chars]
  split: {{by: [minhash.component, exact.clique], held_out_fraction: 0.25}}
  tokenizer: {{vocab_size: 512, sample_bytes: 200000}}
  tokenize: {{spans: [pii.spans]}}
  mix:
    held_out_docs: 5
    phases:
      pretrain: {{components: [{{dataset: notes, weight: 1.0, max_epochs: 2}}]}}
policy:
  final:
    - {{drop: signals.words < 20, reason: too_short}}
"""
