//! fulgurite-runner
