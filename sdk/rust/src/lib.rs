//! fulgurite-sdk
