-- What embeddings.assert_model() looks for in the catalog. {marker}: the active model's; {next_marker}: its name from now on.

ALTER TABLE {marker} RENAME TO {next_marker}
