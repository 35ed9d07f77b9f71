//! fulgurite-trainer
