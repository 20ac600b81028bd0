"""Where vectors are kept: a table of ours a model (`table`), or a column of the user's own table (`column`).
Every room above uses a destination by the verbs of `base`; none asks which kind it is (`factory` makes it).
"""
