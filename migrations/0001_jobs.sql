-- Jobs, their events, and the images that came with them. The same text runs on SQLite and on
-- PostgreSQL; {bytes} is BLOB or BYTEA. Times are milliseconds since the Unix epoch by the
-- database's clock, flags are 0 or 1.

CREATE TABLE jobs (
    id TEXT PRIMARY KEY,              -- ULID: sorts by arrival
    kind TEXT NOT NULL,               -- quantize, evaluate
    model TEXT NOT NULL,              -- made or read by the job
    target TEXT,                      -- model id that nobody else may make meanwhile
    spec TEXT NOT NULL,               -- JSON
    spec_hash TEXT NOT NULL,          -- equal for equal requests
    priority BIGINT NOT NULL,         -- larger goes first
    state TEXT NOT NULL,              -- queued, running, cancelling, succeeded, failed, cancelled
    active BIGINT NOT NULL,           -- 1 until the job has ended
    attempt BIGINT NOT NULL,          -- fences writes of a worker that lost its lease
    attempts_left BIGINT NOT NULL,
    lease_owner TEXT,
    lease_expires_ms BIGINT,
    created_ms BIGINT NOT NULL,
    started_ms BIGINT,
    ended_ms BIGINT,
    progress TEXT,                    -- JSON, the latest
    outcome TEXT,                     -- JSON, once ended
    last_sequence BIGINT NOT NULL
);

CREATE UNIQUE INDEX jobs_target ON jobs (target) WHERE target IS NOT NULL AND active = 1;
CREATE UNIQUE INDEX jobs_spec ON jobs (spec_hash) WHERE active = 1;
CREATE INDEX jobs_waiting ON jobs (priority DESC, id) WHERE active = 1;
CREATE INDEX jobs_ended ON jobs (ended_ms) WHERE active = 0;

-- Which job a client's call made or found.
CREATE TABLE job_requests (
    request_id TEXT PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    spec_hash TEXT NOT NULL
);

CREATE TABLE job_events (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    sequence BIGINT NOT NULL,         -- from 1
    time_ms BIGINT NOT NULL,
    kind TEXT NOT NULL,               -- accepted, progress, ended
    body TEXT,                        -- JSON of progress
    PRIMARY KEY (job_id, sequence)
);

CREATE TABLE job_images (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    position BIGINT NOT NULL,
    content {bytes} NOT NULL,         -- as it came; gone when the job ends
    PRIMARY KEY (job_id, position)
);
