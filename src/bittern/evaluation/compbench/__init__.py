"""T2I-CompBench [Huang et al. 2023, arXiv:2307.06350], attributes, places, numbers and actions put together.

`prompts` reads its files, `layout` its folders, `rules` and `phrases` say what is asked without a model; `blip`,
`detector` and `depth` look at pictures; `judge` brings them together and `suite` runs all of it.
"""
