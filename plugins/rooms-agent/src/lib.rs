//! rooms-agent
