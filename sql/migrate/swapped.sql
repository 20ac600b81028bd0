-- Into the next phase; no row where somebody else has gone on meanwhile. Parameters: id, from_phase, phase.

UPDATE embeddings.migration
SET phase = %(phase)s,
    swapped_at = CASE WHEN %(phase)s = 'swapped' THEN now() ELSE swapped_at END,
    ended_at = CASE WHEN %(phase)s IN ('contracted', 'abandoned') THEN now() END
WHERE id = %(id)s AND phase = %(from_phase)s
