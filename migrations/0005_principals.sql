-- Who asked for a job: what its share of the server is counted by.

ALTER TABLE jobs ADD COLUMN principal TEXT NOT NULL DEFAULT '';
CREATE INDEX jobs_principal ON jobs (principal) WHERE active = 1;
