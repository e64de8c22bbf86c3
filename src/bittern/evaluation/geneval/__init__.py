"""GenEval [Ghosh et al. 2023, arXiv:2310.11513]: do objects, counts, colours and places come as the prompt says?

`metadata` reads the official prompts, `detector` and `colors` look at a picture, `rules` reach a verdict from what
they saw, `folder` keeps the official layout and what a killed run needs to go on, `suite` does all of it.
"""
