-- The texts nearest to a vector. Parameters: query, n.

SELECT text_id, 1 - (embedding <=> %(query)s::{type})
FROM {vector}
WHERE vector_name = {vector_name}
ORDER BY embedding <=> %(query)s::{type}
LIMIT %(n)s
