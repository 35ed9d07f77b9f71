//! fulgurite-store
