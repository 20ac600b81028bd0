-- A vector goes because its text went, never because a run happened not to encode it.

DELETE FROM {vector} AS vector USING landing_gone AS gone WHERE vector.text_id = gone.id
