-- What hosted models need: who makes which model's vectors, and what may still be sent this minute.

-- Profiles that give the same vectors as a model, though their own fingerprint is another: the model at another place.
CREATE TABLE embeddings.maker (
    collection  text NOT NULL,
    maker       text NOT NULL,                           -- the profile's own fingerprint
    fingerprint text NOT NULL,                           -- the model whose vectors it makes
    profile     jsonb NOT NULL,
    cosine      double precision NOT NULL,               -- the lowest of the canaries, when it was bound
    bound_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, maker),
    FOREIGN KEY (collection, fingerprint) REFERENCES embeddings.model ON DELETE CASCADE ON UPDATE CASCADE
);

-- `requests_at` and `tokens_at` say until when what was taken lasts at the permitted rate (a token bucket, told as times:
-- the generic cell rate algorithm). A row a model of an account.
CREATE TABLE embeddings.rate (
    account             text NOT NULL,                   -- a hash of the server's address and the key
    model               text NOT NULL,
    requests_at         timestamptz NOT NULL DEFAULT '-infinity',
    tokens_at           timestamptz NOT NULL DEFAULT '-infinity',
    closed_until        timestamptz NOT NULL DEFAULT '-infinity', -- the server said to wait
    server_requests     double precision,                -- a minute, as its headers say
    server_tokens       double precision,
    asked_at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (account, model)
);

-- How long a cost lasts at a limit a minute. 95.7 % of the limit is given out evenly and 1 % at once, so that no minute
-- has more than 96.7 %: the rest, two seconds' worth, is for requests that take different times to arrive. A cost of 1 %
-- or more is spaced so that whole ones fit into a minute (62 s: the same margin).
CREATE FUNCTION embeddings.rate_interval(cost double precision, per_minute double precision)
RETURNS interval LANGUAGE sql IMMUTABLE AS $$
    SELECT make_interval(secs => CASE
        WHEN cost < 0.01 * per_minute THEN cost * 60 / (0.957 * per_minute)
        WHEN cost <= per_minute THEN 62 / floor(per_minute / cost)
        ELSE 62 * cost / per_minute
    END)
$$;

-- When a cost may be spent: 1 % of a minute's may be ahead.
CREATE FUNCTION embeddings.rate_start(spent_until timestamptz, moment timestamptz, lasts interval)
RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(moment, greatest(moment, spent_until) + lasts - greatest(lasts, interval '0.627 s'))
$$;

-- Take one request and its tokens. Seconds to wait before it is sent, if that is at most `most_wait`; else nothing is
-- taken, and the result is below zero: how long to wait before asking again. NULL limits are none.
CREATE FUNCTION embeddings.take_rate(
    of_account text, of_model text, tokens double precision, requests_per_minute double precision,
    tokens_per_minute double precision, most_wait double precision
) RETURNS double precision LANGUAGE plpgsql AS $$
DECLARE
    bucket  embeddings.rate;
    moment  timestamptz;
    start   timestamptz;
    request interval;
    spent   interval;
    wait    double precision;
BEGIN
    INSERT INTO embeddings.rate (account, model) VALUES (of_account, of_model) ON CONFLICT DO NOTHING;
    SELECT * INTO bucket FROM embeddings.rate WHERE account = of_account AND model = of_model FOR UPDATE;
    moment := clock_timestamp();
    IF bucket.asked_at > moment + interval '1 s' THEN    -- the server's clock was put back: all times with it
        bucket.requests_at := bucket.requests_at - (bucket.asked_at - moment);
        bucket.tokens_at := bucket.tokens_at - (bucket.asked_at - moment);
        bucket.closed_until := bucket.closed_until - (bucket.asked_at - moment);
    END IF;
    request := embeddings.rate_interval(1, least(requests_per_minute, bucket.server_requests));
    spent := embeddings.rate_interval(tokens, least(tokens_per_minute, bucket.server_tokens));
    start := greatest(
        bucket.closed_until,
        embeddings.rate_start(bucket.requests_at, moment, request),
        embeddings.rate_start(bucket.tokens_at, moment, spent)
    );
    wait := greatest(0, extract(epoch FROM start - moment));
    IF wait <= most_wait THEN
        bucket.requests_at := coalesce(greatest(moment, bucket.requests_at) + request, bucket.requests_at);
        bucket.tokens_at := coalesce(greatest(moment, bucket.tokens_at) + spent, bucket.tokens_at);
    ELSE
        wait := -wait;
    END IF;
    UPDATE embeddings.rate SET
        requests_at = bucket.requests_at, tokens_at = bucket.tokens_at, closed_until = bucket.closed_until,
        asked_at = moment
    WHERE account = of_account AND model = of_model;
    RETURN wait;
END $$;

-- What an answer said: tokens that were taken too few (or, below zero, too many), the server's own limits and what they
-- leave, and how long it says to wait. NULL: it did not say.
CREATE FUNCTION embeddings.settle_rate(
    of_account text, of_model text, more_tokens double precision, tokens_per_minute double precision,
    limit_requests double precision, limit_tokens double precision, left_requests double precision,
    left_tokens double precision, closed double precision
) RETURNS void LANGUAGE sql AS $$
    UPDATE embeddings.rate SET
        server_requests = coalesce(limit_requests, server_requests),
        server_tokens = coalesce(limit_tokens, server_tokens),
        requests_at = greatest(requests_at, clock_timestamp() + interval '60 s' * (0.01 - left_requests / limit_requests)),
        tokens_at = greatest(
            tokens_at + coalesce(
                sign(more_tokens) * make_interval(
                    secs => abs(more_tokens) * 60 / (0.957 * least(tokens_per_minute, limit_tokens, server_tokens))
                ),
                interval '0'
            ),
            clock_timestamp() + interval '60 s' * (0.01 - left_tokens / limit_tokens)
        ),
        closed_until = greatest(closed_until, clock_timestamp() + make_interval(secs => closed))
    WHERE account = of_account AND model = of_model
$$;
