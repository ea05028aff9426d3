-- The trace in which a job was asked for (W3C traceparent): its calculation links back to it.

ALTER TABLE jobs ADD COLUMN traceparent TEXT;
