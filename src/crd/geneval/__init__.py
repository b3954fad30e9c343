"""GenEval: prompts, scoring and detectors of the compositional benchmark (Ghosh et al. 2023, arXiv 2310.11513)."""
