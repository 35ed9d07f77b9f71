//! fulgurite-adapter
