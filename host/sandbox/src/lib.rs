//! fulgurite-sandbox
