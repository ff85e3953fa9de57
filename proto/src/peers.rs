//! Where each rank of a gang listens, encoded once.
//!
//! A gang of n trainers has n proposals, each with n addresses. As a list of strings that would be n² of them to make, hold and encode; so
//! all proposals share the bytes of one. On the wire it is the message `thaw.v1.Peers`.

use prost::DecodeError;
use prost::bytes::{Buf, BufMut};
use prost::encoding::{self, DecodeContext, WireType};
use std::fmt;
use std::sync::Arc;

/// Number of the only field.
const ADDRESSES: u32 = 1;

/// `host:port` of each rank, in rank order. A cheap clone.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Peers {
    encoded: Arc<Vec<u8>>,
    count: usize,
}

impl Peers {
    /// Size of the gang.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// In rank order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut left = self.encoded.as_slice();
        std::iter::from_fn(move || {
            encoding::decode_varint(&mut left).ok()?;
            let length = usize::try_from(encoding::decode_varint(&mut left).ok()?).ok()?;
            let (address, rest) = left.split_at_checked(length)?;
            left = rest;
            Some(std::str::from_utf8(address).expect("only strings were put in"))
        })
    }

    fn push(&mut self, address: &str) {
        let encoded = Arc::make_mut(&mut self.encoded);
        encoding::encode_key(ADDRESSES, WireType::LengthDelimited, encoded);
        encoding::encode_varint(address.len() as u64, encoded);
        encoded.put_slice(address.as_bytes());
        self.count += 1;
    }
}

impl<S: AsRef<str>> FromIterator<S> for Peers {
    fn from_iter<I: IntoIterator<Item = S>>(addresses: I) -> Self {
        let mut peers = Self::default();
        addresses.into_iter().for_each(|address| peers.push(address.as_ref()));
        peers
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl prost::Message for Peers {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.encoded);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        if tag != ADDRESSES {
            return encoding::skip_field(wire_type, tag, buf, context);
        }
        let mut address = String::new();
        encoding::string::merge(wire_type, &mut address, buf, context)?;
        self.push(&address);
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.encoded.len()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;
    use prost::Message as _;

    #[test]
    fn it_is_a_list_of_strings_on_the_wire() {
        let addresses = ["127.0.0.1:9000", "", "worker-7.example:65535"];
        let propose = pb::Propose { rank: 2, peers: Some(addresses.iter().collect()), ..Default::default() };
        let bytes = propose.encode_to_vec();
        assert_eq!(bytes.len(), propose.encoded_len());
        let read = pb::Propose::decode(bytes.as_slice()).unwrap();
        assert_eq!(read, propose);
        assert!(read.peers.as_ref().unwrap().iter().eq(addresses));
        // As everybody else reads it, by the description of the message.
        let pool = prost_reflect::DescriptorPool::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
        let described = pool.get_message_by_name("thaw.v1.Propose").unwrap();
        let dynamic = prost_reflect::DynamicMessage::decode(described, bytes.as_slice()).unwrap();
        let peers = dynamic.get_field_by_name("peers").unwrap();
        let list = peers.as_message().unwrap().get_field_by_name("addresses").unwrap();
        let strings: Vec<&str> = list.as_list().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
        assert_eq!(strings, addresses);
    }

    #[test]
    fn a_text_that_is_none_is_refused() {
        assert!(Peers::decode([0x0a, 1, 0xff].as_slice()).is_err());
        assert!(Peers::decode([0x0a, 5, b'a'].as_slice()).is_err());
    }
}
