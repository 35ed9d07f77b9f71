//! Stores that an older Fulgurite wrote.
//!
//! From schema 2 on records are read as they are ([`SCHEMA_READABLE`](crate::sled_store::SCHEMA_READABLE)): such a store
//! only gets the new number when it is opened.
//!
//! Each older schema has a module with its records as they were, frozen: a type here never follows a change of
//! `fulgurite-core`. Types that a schema shares with the next one are not repeated; the fixture of that schema, bytes that
//! its own code wrote, fails the test of migration as soon as one of them changes, and the remedy is to freeze it then.

pub(crate) mod v1;
