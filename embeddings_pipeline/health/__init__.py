"""Is a collection covered, sound, fresh, in agreement with its copies, and does its model still give the same vectors?

Search, orchestration and the command line ask; an audit makes dirty what does not agree, and nothing else here writes.
"""
