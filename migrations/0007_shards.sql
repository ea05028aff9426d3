-- Parts of evaluations under way, which workers of several processes take. Gone when the job ends.

CREATE TABLE job_shards (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    position BIGINT NOT NULL,         -- from 0
    inputs TEXT NOT NULL,             -- equal for workers whose numbers can be added
    first BIGINT NOT NULL,            -- image that it begins with
    images BIGINT NOT NULL,
    attempt BIGINT NOT NULL,          -- fences writes of a worker that lost its lease
    lease_owner TEXT,
    lease_expires_ms BIGINT,
    done BIGINT NOT NULL,
    metrics TEXT,                     -- JSON: the numbers so far, final once it is done
    PRIMARY KEY (job_id, position)
);
