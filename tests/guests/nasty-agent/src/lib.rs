//! nasty-agent
