"""Typed settings of the recipe. Every number of the paper is defined here once, with its section.

The classes are OmegaConf schemas: reading a configuration with an unknown key or a value of the wrong type raises an error.
Section numbers are those of Chen & Rudnicky, arXiv 2110.06309; "code" is the authors' public implementation.
The defaults are the preset `paper` (configs/recipe/paper.yaml): the paper where it speaks, the code where it does not, and no utterance's
features depend on its batch. The preset `published` (configs/recipe/published.yaml) follows the code in everything.
"""
