"""What suites share that draw prompts into a folder and judge every picture: GenEval and T2I-CompBench.

`folder` keeps a run's files and lets a killed run go on, `judging` finds out about every picture once, and `course`
goes from a model, or from pictures that are there, to scores and their paired difference.
"""
