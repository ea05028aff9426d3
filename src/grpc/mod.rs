//! The services: thin methods that validate, convert, call the engine, and convert back.

pub mod proto;
