-- What an unfinished calibration has finished: results of its units, as objects in the artifact
-- store. Gone when the job ends.

CREATE TABLE job_units (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    unit TEXT NOT NULL,
    digest TEXT NOT NULL,             -- sha256 of the object
    PRIMARY KEY (job_id, unit)
);

CREATE INDEX job_units_digest ON job_units (digest);
