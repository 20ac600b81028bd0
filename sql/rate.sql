-- What may be sent to a hosted model, and when: the functions are in sql/schema/0010_hosted.sql.
-- Parameters: account, model: whose bucket.

-- name: take
-- Parameters: tokens: of the request; requests_per_minute, tokens_per_minute: the limits that are set, NULL for none;
-- most_wait: seconds by which it may be taken before it is due.

SELECT embeddings.take_rate(
    %(account)s, %(model)s, %(tokens)s, %(requests_per_minute)s, %(tokens_per_minute)s, %(most_wait)s
)

-- name: settle
-- Parameters: more_tokens: that were billed, than taken; tokens_per_minute: the limit that is set; limit_requests,
-- limit_tokens, left_requests, left_tokens, closed: what the server's headers said, NULL where they did not.

SELECT embeddings.settle_rate(
    %(account)s, %(model)s, %(more_tokens)s, %(tokens_per_minute)s, %(limit_requests)s, %(limit_tokens)s,
    %(left_requests)s, %(left_tokens)s, %(closed)s
)
