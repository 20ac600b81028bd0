-- What may be sent to a hosted model, and when: the functions are in sql/schema/0013_hosted.sql.

-- name: take
SELECT embeddings.take_rate(
    %(account)s, %(model)s, %(tokens)s, %(requests_per_minute)s, %(tokens_per_minute)s, %(most_wait)s
)

-- name: settle
SELECT embeddings.settle_rate(
    %(account)s, %(model)s, %(more_tokens)s, %(tokens_per_minute)s, %(limit_requests)s, %(limit_tokens)s,
    %(left_requests)s, %(left_tokens)s, %(closed)s
)
